"""A callback of transformers' Trainer that verifies the first batch before the first step."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_attn_plugin.verification.batches import shorten_batch
from hf_attn_plugin.verification.report import VerifyReport
from hf_attn_plugin.verification.verify import verify

logger = logging.get_logger(__name__)


class VerifyCallback(TrainerCallback):
    """Runs `verify` on the first batch that training feeds the model, just as it is fed.

    Raises `AttentionMismatchError` out of ``trainer.train()``, before anything is learned, if a
    layer does not compute what eager attention would. Random state and the order of the data stay
    as they are.

    Args:
        gradients: Compare gradients of queries, keys and values too.
        max_tokens: Rows are cut to so many tokens, since eager attention takes time and memory
            quadratic in their number; None takes them whole.

    Attributes:
        report: What was found; None before the first batch.
    """

    def __init__(self, gradients: bool = False, max_tokens: int | None = 2048) -> None:
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"VerifyCallback: max_tokens must be at least 2, got {max_tokens}.")
        self.gradients = gradients
        self.max_tokens = max_tokens
        self.report: VerifyReport | None = None
        self._handle: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Wait for the model's first call."""
        if model is None:
            raise ValueError("VerifyCallback: the Trainer has no model to verify.")
        self._handle = model.register_forward_pre_hook(self._first_call, with_kwargs=True)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop waiting, where no batch came."""
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _first_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stop_waiting()
        batch = kwargs if self.max_tokens is None else shorten_batch(kwargs, self.max_tokens)
        self.report = verify(model, batch, gradients=self.gradients)
        self.report.raise_if_different()
        # At a level that is shown by default: whoever asked for it wants to see that it was done.
        logger.warning("attention of the first batch:\n%s", self.report)
