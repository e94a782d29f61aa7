"""The cases of ``hf-attn bench ring``, for any number of ranks, and small ones for a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .cases import DOCUMENTS, PACKED, Case

# What every layout divides evenly: 8 chunks of 16 tokens for each rank.
_UNIT = 8 * 16
_TINY_LENGTH = 512

CASES = {
    case.name: case
    for case in (
        Case("causal", "causal", 131072),
        Case("causal-short", "causal", 32768),
        Case("window", "window 4096", 262144, window=4096),
        Case("documents", f"{DOCUMENTS} packed documents", PACKED, packed=True),
        Case("global", "window 4096 + 64 global", 131072, window=4096, num_global_tokens=64),
    )
}

# What two GPUs are to reach: least efficiency, and most milliseconds on H200s.
TO_REACH: dict[str, tuple[float, float | None]] = {
    "causal": (0.95, 430.0),
    "causal-short": (0.90, None),
    "window": (0.93, None),
    "documents": (0.85, None),
}


def chosen_cases(
    names: Sequence[str], ranks: int, *, quick: bool = False, tiny: bool = False
) -> list[Case]:
    """The cases by name, all where none is named, at lengths that the ranks share evenly.

    Args:
        names: Keys of `CASES`.
        ranks: How many share a sequence.
        quick: An eighth of the lengths.
        tiny: A few tokens and heads, for a device without kernels.

    Raises:
        ValueError: There is no such case.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(
            f"no case of hf-attn bench ring is named {', '.join(unknown)}: choose from "
            f"{', '.join(CASES)}, or model or draw"
        )
    cases = [CASES[name] for name in names or CASES]
    if tiny:
        return [_tiny(case, ranks) for case in cases]
    return [_even(case, case.length // 8 if quick else case.length, ranks) for case in cases]


def gate_case(case: Case, ranks: int) -> Case:
    """The case at a length at which the reference has room for all queries."""
    short = case.for_gate().length
    if case.length <= short:
        return case
    return _even(case, -(-short // (_UNIT * ranks)) * _UNIT * ranks, ranks)


def _even(case: Case, length: int, ranks: int) -> Case:
    unit = _UNIT * ranks
    return case.at(max(1, length // unit) * unit)


def _tiny(case: Case, ranks: int) -> Case:
    return dataclasses.replace(
        _even(case, _TINY_LENGTH, ranks),
        window=case.window and _TINY_LENGTH // 8,
        num_global_tokens=case.num_global_tokens // 16,
        title=case.title.replace(" 4096", "").replace("64 global", "global"),
        heads=8,
        kv_heads=4,
        head_dim=16,
    )
