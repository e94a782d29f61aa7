"""The whole path on a small model: text, long context, conversion, evaluation, model folder."""

from hf_attn_plugin.quickstart.run import run_quickstart
from hf_attn_plugin.quickstart.settings import QuickstartSettings

__all__ = ["QuickstartSettings", "run_quickstart"]
