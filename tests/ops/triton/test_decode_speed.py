"""The decoding benchmark's own judgement, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.speed.decoding import CASES, HEAD_DIM, HEADS, DecodeCase, DecodeRow, check, run, table
from hf_attn_plugin.ops.reference import reference_attention


def test_wrong_outputs_are_refused() -> None:
    torch.manual_seed(0)
    case = DecodeCase(2, 64, 2, queries=2, window=8, num_sink_tokens=1)
    query = torch.randn(2, HEADS, 2, HEAD_DIM).bfloat16()
    key, value = (torch.randn(2, 2, 64, HEAD_DIM).bfloat16() for _ in range(2))
    right, _ = reference_attention(query, key, value, case.pattern(query.device))
    assert check(case, (query, key, value), right) <= 1
    no_sink = case.pattern(query.device).replace(num_sink_tokens=0)
    wrong, _ = reference_attention(query, key, value, no_sink)
    assert check(case, (query, key, value), wrong) > 1
    unwritten = right.clone()
    unwritten[-1, -1, -1, -1] = float("nan")
    assert check(case, (query, key, value), unwritten) == float("inf")


def test_bytes_of_what_is_seen() -> None:
    assert DecodeCase(1, 131072, 8).nbytes == 131072 * 8 * 128 * 2 * 2
    assert DecodeCase(2, 1000, 8, window=10, num_sink_tokens=4).nbytes == 2 * 8 * 14 * 128 * 4
    assert all(case.seen <= case.length for case in CASES)


def test_ratios_are_of_the_same_case() -> None:
    rows = [
        DecodeRow("a", "sdpa-cudnn", "ok", 3.0, 1.0, 1e12, 0.5),
        DecodeRow("a", "triton", "ok", 2.0, 1.0, 2e12, 0.5),
        DecodeRow("b", "triton", "FAILED numerics", error=2.0),
    ]
    header, cells = table(rows, 4e12)
    at = header.index("vs sdpa-cudnn")
    assert [row[at] for row in cells] == ["1.00x", "1.50x"]
    assert cells[1][header.index("of copy")] == "50%"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_says_that_it_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, command="hf-attn bench decode") == 1
    assert "needs a GPU" in capsys.readouterr().err
