"""Several processes compute what one does: loss, logits and all gradients, model by model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parallel.processes import run_processes
from tests.sequence_parallelism.cases import Case, alone, difference, together

WINDOWED = (("window", 6), ("num_sink_tokens", 2))
LOCAL = (("window", 5), ("num_global_tokens", 2))

IN_TWO = [
    Case("llama", "llama"),
    Case("llama padded on the left", "llama", "left"),
    Case("llama packed and padded", "llama", "packed-right"),
    Case("llama by lengths", "llama", "lengths"),
    Case("llama, labels on one rank", "llama", "few", schedule="ring"),
    Case("llama by heads", "llama", "packed", schedule="ulysses"),
    Case("llama, checkpoints", "llama", "packed", checkpointing="reentrant"),
    Case("mistral packed", "mistral", "packed", layout="contiguous"),
    Case("mistral, checkpoints", "mistral", "left", checkpointing="new"),
    Case("gemma2 packed", "gemma2", "packed", schedule="gather", layout="zigzag"),
    Case("gemma3 padded", "gemma3_text", "right"),
    Case("gpt-oss packed", "gpt_oss", "packed", schedule="ring", layout="zigzag"),
    Case("gpt-oss padded", "gpt_oss", "left", schedule="gather"),
    Case("bert", "bert", "masked-right"),
    Case("modernbert", "modernbert", "masked-left"),
    Case("linear packed", "llama", "packed", attn="linear"),
    Case("sliding_window", "llama", "packed-right", "sliding_window", parameters=WINDOWED),
    Case("longformer encoder", "bert", "masked-right-globals", "longformer", parameters=LOCAL),
    Case("strided", "llama", "left", "strided", parameters=(("window", 4), ("stride", 6))),
    Case("chunks", "llama4_text", "packed", overrides=(("attention_chunk_size", 9),)),
    Case("longrope", "phi3", "plain", layout="contiguous"),
    Case("roberta", "roberta", "masked-right"),
    Case("opt padded on the left", "opt", "left"),
    Case("one model's embeddings", "llama", "packed-embeds", schedule="ring"),
]
IN_FOUR = [
    Case("llama packed", "llama", "packed"),
    Case("llama padded, ring", "llama", "left", schedule="ring"),
    Case("mistral", "mistral", "right", layout="contiguous"),
    Case("gemma3 packed", "gemma3_text", "packed", schedule="gather", layout="zigzag"),
    Case("gpt-oss packed", "gpt_oss", "packed"),
    Case("bert", "bert", "masked-left", schedule="ring"),
    Case("linear", "llama", "right", attn="linear", layout="zigzag"),
    Case("longformer", "llama", "packed-globals", "longformer", parameters=LOCAL),
]


@pytest.fixture(scope="module")
def found() -> Callable[[int], list[dict[str, Any]]]:
    """What every rank of so many processes computed, of all cases in one run."""
    made: dict[int, list[dict[str, Any]]] = {}

    def run(count: int) -> list[dict[str, Any]]:
        if count not in made:
            cases = {2: IN_TWO, 4: IN_FOUR}[count]
            made[count] = run_processes(together, count, cases, limit_s=240)
        return made[count]

    return run


@pytest.mark.parametrize(
    ("count", "case"),
    [(2, case) for case in IN_TWO] + [(4, case) for case in IN_FOUR],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_ranks_compute_what_one_process_does(count: int, case: Case, found: Any) -> None:
    expected = alone(case)
    ranks = found(count)
    assert len(ranks) == count
    for rank in ranks:
        assert difference(case, rank[case.name], expected) is None


@pytest.mark.parametrize("fault", ["a key is lost", "gradient of keys stays away"])
def test_an_error_on_one_rank_is_seen(fault: str) -> None:
    case = dataclasses.replace(IN_TWO[0], schedule="gather")
    ranks = run_processes(together, 2, [case], fault)
    expected = alone(case)
    assert difference(case, ranks[0][case.name], expected) is not None
    same_loss = torch.allclose(ranks[0][case.name]["loss"], expected["loss"], rtol=1e-6)
    assert same_loss == (fault != "a key is lost")
