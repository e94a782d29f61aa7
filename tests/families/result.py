"""What became of one architecture."""

from __future__ import annotations

import dataclasses

EQUAL, REFUSED, BYPASSING, EMPTY = "equal", "refused", "bypassing", "no attention"
PART_EQUAL, WHOLE_REFUSED = "text part equal", "whole refused, text part equal"
NOT_BUILT, BROKEN = "not built", "broken"
AS_EAGER, AS_SDPA = "as eager", "as sdpa"
BY_LENGTHS, ABSENT = "equal by cu_seq_lens", "-"
GOOD = (EQUAL, PART_EQUAL, WHOLE_REFUSED, REFUSED, BYPASSING, EMPTY, NOT_BUILT)
CHECKS = ("left", "right", "packed", "dynamic", "static", "checkpointing")


@dataclasses.dataclass
class Result:
    """What became of one architecture.

    Attributes:
        architecture: The model type.
        model_class: The class that was compared.
        outcome: One of `GOOD`, or ``broken``: something else was computed, or a raw error raised.
        outputs: Largest error of an output, relative to its largest value.
        gradients: Largest error of a parameter's gradient, relative to the largest of its module.
        control: The error that a mask wrong in one key per query makes in the outputs.
        checks: By name of the check: ``equal``, ``refused: why``, ``as eager`` (documents see each
            other, as in eager attention), ``as sdpa`` (eager computes with its own rows of
            padding), ``equal by cu_seq_lens`` (documents are told apart by these and not by
            position_ids) or ``-`` (eager cannot do it either).
        message: Why it was refused or not built, or what broke.
        note: What else is worth knowing.
        precision: The dtype of the comparison.
        versions: Of transformers and torch.
    """

    architecture: str
    model_class: str = ""
    outcome: str = ""
    outputs: float | None = None
    gradients: float | None = None
    control: float | None = None
    checks: dict[str, str] = dataclasses.field(default_factory=dict)
    message: str = ""
    note: str = ""
    precision: str = ""
    versions: str = ""
