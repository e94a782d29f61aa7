"""Whether a model attends as eager attention would under the same pattern, layer by layer."""

from hf_attn_plugin.verification.batches import DecodingBatch, example_batches
from hf_attn_plugin.verification.callback import VerifyCallback
from hf_attn_plugin.verification.report import AttentionMismatchError, LayerCheck, VerifyReport
from hf_attn_plugin.verification.verify import verify, verify_batches

__all__ = [
    "AttentionMismatchError",
    "DecodingBatch",
    "LayerCheck",
    "VerifyCallback",
    "VerifyReport",
    "example_batches",
    "verify",
    "verify_batches",
]
