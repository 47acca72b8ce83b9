"""Export a model for OpenVINO Model Server and ovms-lora: `python export_model.py text_generation --help`."""

import sys

from ovms_lora.export.cli import main

if __name__ == "__main__":
    sys.exit(main())
