"""ovms-lora: serve LLMs with many LoRA adapters on OpenVINO."""

__version__ = "0.1.0"
