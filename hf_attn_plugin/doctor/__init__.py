"""What this machine and a model would do together, found out without loading any weights."""

from hf_attn_plugin.doctor.environment import Device, Package, devices, packages
from hf_attn_plugin.doctor.report import ModelReport, Report, examine

__all__ = ["Device", "ModelReport", "Package", "Report", "devices", "examine", "packages"]
