"""What all tests share: the process's OpenVINO Core comes first, and its signal stack stays (see engine/device.py)."""

from __future__ import annotations

from ovms_lora.engine.device import openvino_core

# Asking for a property loads the CPU device, also where other libraries make Cores of their own later.
openvino_core().get_property("CPU", "FULL_DEVICE_NAME")
