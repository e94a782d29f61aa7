"""The benchmarks' own parts: pairs, the numerics gate, timing, kept results, tables. No GPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_attn_plugin import attention
from hf_attn_plugin.cli.bench import speed_module
from hf_attn_plugin.patterns import Pattern

cases, numerics, timing = (speed_module(name) for name in ("cases", "numerics", "timing"))
contenders, report, table = (speed_module(name) for name in ("contenders", "report", "table"))

CPU = torch.device("cpu")


class CountingClock:
    """A clock that moves on by itself only when it is looked at."""

    def __init__(self, tick: float = 2.0) -> None:
        self.now, self.tick, self.flushed = 0.0, tick, 0

    def flush(self) -> None:
        self.flushed += 1

    def mark(self) -> float:
        self.now += self.tick
        return self.now

    def elapsed_ms(self, start: float, end: float) -> float:
        return end - start

    def reset_peak(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 3 * 2**30


def small(case: Any, length: int = 192) -> Any:
    """A case with everything a sixteenth of its size."""
    return dataclasses.replace(
        case.at(length),
        window=case.window and max(1, case.window // 32),
        num_global_tokens=case.num_global_tokens // 16,
        stride=case.stride and case.stride // 4,
        heads=4,
        kv_heads=2,
        head_dim=8,
    )


SMALL = [small(case) for case in cases.CASES.values()]


@pytest.fixture
def short_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.Case, "for_gate", lambda case: case.at(128))
    monkeypatch.setattr(table, "free", lambda device: None)  # collecting garbage takes long


# -- patterns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*SMALL, *(small(c, 700) for c in cases.CASES.values())], ids=str)
def test_pairs_are_counted_exactly(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_COUNT_BLOCK", 64)
    pattern = case.pattern("cpu")
    assert cases.count_pairs(pattern, "cpu") == int(pattern.visible("cpu").sum())


def test_pairs_of_the_large_cases() -> None:
    """By hand: S (S + 1) / 2 for causal; a window's rows are full but the first."""
    full, window = cases.CASES["full"], cases.CASES["window-1024"]
    pairs = cases.count_pairs(full.pattern("cpu"), "cpu")
    assert pairs == 16384 * 16385 // 2
    assert full.forward_flops(pairs) == 4 * 32 * 128 * pairs
    short = window.at(8192)
    assert cases.count_pairs(short.pattern("cpu"), "cpu") == 1024 * 1025 // 2 + 7168 * 1024


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_get_the_same_mask(case: Any) -> None:
    from torch.nn.attention.flex_attention import create_mask

    pattern = case.pattern("cpu")
    function = contenders.mask_function(case, pattern)
    mask = create_mask(function, None, None, case.length, case.length, device="cpu")
    assert torch.equal(mask, pattern.visible("cpu"))


def test_block_masks_in_strips_are_the_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    monkeypatch.setattr(contenders, "_STRIP", 256)
    case = dataclasses.replace(small(cases.CASES["global"], 600), window=200)
    pattern, size = case.pattern("cpu"), (case.length, case.length)
    strips = contenders.block_mask(case, pattern, CPU)
    function = contenders.mask_function(case, pattern)
    whole = create_block_mask(function, None, None, *size, device="cpu")
    assert strips.shape == whole.shape
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_num_blocks"):
        assert torch.equal(getattr(strips, name), getattr(whole, name))


def test_documents_are_the_same_everywhere_and_in_range() -> None:
    lengths = cases.document_lengths(cases.PACKED)
    assert len(lengths) == 64
    assert sum(lengths) == 131072
    assert min(lengths) >= 500
    assert max(lengths) <= 8000
    assert max(lengths) > 4 * sorted(lengths)[32] // 2  # few long ones, not all alike
    assert lengths == cases.document_lengths(cases.PACKED)
    assert lengths != cases.document_lengths(cases.PACKED, seed=1)
    assert sum(cases.document_lengths(2048)) == 2048
    with pytest.raises(ValueError, match="cannot be split into 64 documents"):
        cases.document_lengths(63)


# -- the gate --------------------------------------------------------------------------------------


def inputs_for(case: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    return numerics.Inputs.random(
        batch=1,
        heads=case.heads,
        kv_heads=case.kv_heads,
        tokens=case.length,
        head_dim=case.head_dim,
        dtype=dtype,
        device="cpu",
    )


def ours(pattern: Pattern) -> Callable[..., torch.Tensor]:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, pattern)[0]

    return call


class WrongGradient(torch.autograd.Function):
    """Passes on its input, and a gradient with an error in it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, error: Callable[..., torch.Tensor]) -> torch.Tensor:
        ctx.error = error
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.error(grad), None


def last_row(grad: torch.Tensor) -> torch.Tensor:
    """As a kernel that forgets the end: the last key is seen by one query, its gradient small."""
    wrong = grad.clone()
    wrong[:, :, -1] = 0
    return wrong


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_gate_lets_the_right_one_through(case: Any, sampled: bool) -> None:
    rows = numerics.sample_rows(case.length, "cpu") if sampled else None
    pattern = case.pattern("cpu")
    verdict = numerics.Gate(inputs_for(case), pattern, rows).judge(ours(pattern))
    assert verdict.good
    assert verdict.share > 0.01  # bfloat16 has errors: something was compared


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("fault", ["window", "scale", "grad", "nan", "batch of zeros"])
def test_the_gate_refuses_a_wrong_one(fault: str, sampled: bool) -> None:
    case = next(case for case in SMALL if case.name == "window-1024")
    case = dataclasses.replace(case, head_dim=64)
    pattern = case.pattern("cpu")
    right = ours(pattern)

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if fault == "window":
            return ours(pattern.replace(window=case.window + 1))(query, key, value)
        if fault == "grad":
            return right(query, WrongGradient.apply(key, last_row), value)
        output = right(query, key, value)
        if fault == "scale":
            return output * 1.05
        mask = torch.zeros_like(output, dtype=torch.bool)
        mask[:, 1, -1] = True
        return output.masked_fill(mask, float("nan") if fault == "nan" else 0.0)

    rows = numerics.sample_rows(case.length, "cpu") if sampled else None
    verdict = numerics.Gate(inputs_for(case), pattern, rows).judge(wrong)
    assert not verdict.good
    if fault in ("grad", "nan"):
        assert verdict.where == {"grad": "key gradient", "nan": "output"}[fault]


def test_the_sampled_gate_sees_gradients_that_come_from_nowhere() -> None:
    case = SMALL[0]
    pattern, rows = case.pattern("cpu"), torch.tensor([5, 9])

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return ours(pattern)(WrongGradient.apply(query, lambda grad: grad + 1e-3), key, value)

    verdict = numerics.Gate(inputs_for(case), pattern, rows).judge(wrong)
    assert verdict.where == "query gradient of queries without a gradient"


# -- timing ----------------------------------------------------------------------------------------


def test_stages_are_timed_apart_and_together() -> None:
    clock = CountingClock()
    seen = []

    def backward(output: str) -> None:
        seen.append(output)
        clock.now += 10.0

    def forward(nothing: None) -> str:
        clock.now += 3.0
        return "output"

    times = timing.time_stages(clock, [forward, backward], seconds=0.17)
    assert times.stages_ms == (5.0, 12.0)  # a mark itself takes 2 here
    assert times.total_ms == 17.0
    assert times.repeats == 10
    assert set(seen) == {"output"}
    assert clock.flushed == len(seen) == 2 + 2 * 10  # first runs, warm-up, measured
    assert times.extra_bytes == 3 * 2**30


def test_a_time_limit_ends_what_hangs() -> None:
    with pytest.raises(TimeoutError, match=r"flex on full took longer than 0\.05 s"):  # noqa: SIM117
        with timing.time_limit(0.05, "flex on full"):
            time.sleep(5)
    with timing.time_limit(0.05, "quick"):
        pass
    time.sleep(0.1)  # no alarm is left behind


# -- the table -------------------------------------------------------------------------------------


def contender(name: str, change: Callable[..., Any] | None = None, **fields: Any) -> Any:
    def prepare(case: Any, pattern: Pattern, device: torch.device) -> Callable[..., torch.Tensor]:
        call = ours(pattern)
        return call if change is None else lambda q, k, v: change(call(q, k, v))

    fields = {"refuses": lambda case: None, "ours": name == "good", **fields}
    return contenders.Contender(name, name, prepare, **fields)


def too_large(output: torch.Tensor) -> torch.Tensor:
    return output * 1.1


def breaks(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA out of memory")


def hangs(output: torch.Tensor) -> torch.Tensor:
    time.sleep(5)
    return output


def make_bench(path: Path, fresh: bool = False) -> tuple[Any, list[str]]:
    said: list[str] = []
    results = report.Results(path, report.Row, fresh)
    bench = table.Bench(
        CountingClock(tick=100.0), CPU, 100.0, results, peer_timeout=2.0, say=said.append
    )
    return bench, said


def test_rows_of_a_run(tmp_path: Path, short_gate: None) -> None:
    bench, _ = make_bench(tmp_path / "speed.json")
    entrants = [
        contender("peer"),
        contender("absent", module="no_such_module", distribution="no-such-package"),
        contender("narrow", refuses=lambda case: "no windows"),
        contender("broken", breaks),
        contender("slow", hangs),
        contender("wrong", too_large),
        contender("good"),
    ]
    rows = bench.run(SMALL[1:2], entrants)
    by_name = {row.contender: row for row in rows}
    status = {name: row.status for name, row in by_name.items()}
    assert status == {
        "peer": "ok",
        "absent": "missing",
        "narrow": "cannot",
        "broken": "error",
        "slow": "error",
        "wrong": "FAILED numerics",
        "good": "ok",
    }
    assert all(row.total_ms is None for row in rows if row.status != "ok")
    good = by_name["good"]
    assert (good.forward_ms, good.backward_ms, good.total_ms) == (100.0, 100.0, 200.0)
    pairs = cases.count_pairs(SMALL[1].pattern("cpu"), "cpu")
    assert good.tflops == pytest.approx(3.5 * 4 * 4 * 8 * pairs / 200.0 / 1e9)
    assert good.extra_gib == 3.0
    assert good.spread == 0
    assert table.failed(rows)
    assert not table.failed([by_name["peer"], by_name["broken"], by_name["absent"], good])
    assert table.failed([dataclasses.replace(good, status="error")])

    text = report.text_report(rows, ["peer", "absent", "wrong"])
    lines = text.splitlines()
    assert "vs peer" in lines[0]
    assert "vs wrong" not in lines[0]
    assert "FAILED numerics" in next(line for line in lines if line.startswith("wrong"))
    assert "absent: missing: no_such_module cannot be imported" in text
    assert "pip install no-such-package" in text
    assert "narrow: cannot: no windows" in text
    assert "RuntimeError: CUDA out of memory" in text
    assert "slow on window 1024 took longer than 2 s" in text
    assert "times the error that is allowed" in text
    page = report.markdown_report(rows, ["peer"], "hf-attn bench", {"device": "X"})
    assert page.startswith("<!-- Made by: hf-attn bench -->")
    assert "| good | 100.00 | 100.00 | 200.00 |" in page


def test_the_choice_is_held_against_the_best() -> None:
    def row(name: str, total: float | None, status: str = "ok") -> Any:
        return report.Row("full", "full", 64, name, False, status, total_ms=total)

    rows = [row("fa4", 10.0), row("flex", 20.0), row("quick", None, "error"), row("flash", 10.25)]
    assert report.choice_line(rows) == "flash takes 1.025 of the time of fa4, the fastest."
    assert report.choice_line(rows[:3]) is None
    assert "flash takes 1.025" in report.text_report(rows, ["fa4"])


def test_a_contender_that_breaks_later_has_no_time(tmp_path: Path, short_gate: None) -> None:
    calls = []

    def later(output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("out of memory\n\nafter a while")
        return output

    bench, said = make_bench(tmp_path / "speed.json")
    peer, good = bench.run(SMALL[:1], [contender("peer"), contender("good", later)])
    assert peer.status == "ok"
    assert (good.status, good.total_ms) == ("error", None)
    assert good.detail == "RuntimeError: out of memory … after a while"
    assert "Traceback" in said[0]  # of ours the whole of it


def test_what_was_measured_is_kept(tmp_path: Path, short_gate: None) -> None:
    path = tmp_path / "speed.json"
    calls: list[str] = []

    def watched(name: str) -> Any:
        def note(output: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return output

        return contender(name, note)

    first = make_bench(path)[0].run(SMALL[:1], [watched("peer"), contender("wrong", too_large)])
    assert set(calls) == {"peer"}
    calls.clear()
    bench, said = make_bench(path)
    second = bench.run(SMALL[:2], [watched("peer"), watched("wrong"), watched("good")])
    assert second[0] == first[0]  # kept
    assert "kept from an earlier run" in said[0]
    assert [row.status for row in second] == ["ok"] * 6  # what had failed is tried again
    assert "peer" in calls  # on the second case
    calls.clear()
    bench, _ = make_bench(path, fresh=True)
    bench.run(SMALL[:1], [watched("peer")])
    assert calls
    # Another version of the package makes its numbers another's.
    calls.clear()
    bench, _ = make_bench(path)
    bench.run(SMALL[:1], [dataclasses.replace(watched("peer"), distribution="numpy")])
    assert calls


def test_the_choice_is_measured_anew_with_other_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flash` may call FlashAttention-4 or cuDNN; what calls ours alone does not depend on them."""
    bench, _ = make_bench(tmp_path / "speed.json")
    found = contenders.contenders()
    versions = {"flash-attn-4": "4.0.0b36"}

    def version(name: str) -> str:
        return versions.get(name, "1.0")

    def stamps() -> dict[str, str]:
        return {name: bench.stamp(found[name]) for name in ("flash", "triton", "flex")}

    monkeypatch.setattr(contenders.importlib.metadata, "version", version)
    before = stamps()
    versions["flash-attn-4"] = "4.0.0b37"
    after = stamps()
    assert after["flash"] != before["flash"]
    assert (after["triton"], after["flex"]) == (before["triton"], before["flex"])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99999)
    assert stamps()["flash"] != after["flash"]
    # What is measured, and how, concerns everybody.
    monkeypatch.setattr(table, "bench_hash", lambda: "other cases")
    assert not set(stamps().values()) & set(after.values())


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text('{"rows": [{"case": "full"}]}')
    with pytest.raises(ValueError, match="--fresh"):
        report.Results(path, report.Row)


def test_every_contender_says_what_it_needs() -> None:
    found = contenders.contenders()
    assert [name for name, one in found.items() if one.ours] == ["triton", "flash"]
    assert found["sdpa-flash"].refuses(cases.CASES["documents"]) is not None
    assert found["sdpa-flash"].refuses(cases.CASES["full"]) is None
    assert found["flex"].refuses(cases.CASES["strided"]) is None
    fa4 = found["fa4"]
    refused = {name: fa4.refuses(case) for name, case in cases.CASES.items()}
    assert [name for name, why in refused.items() if why] == ["global", "strided"]
    absent = dataclasses.replace(fa4, module="flash_attn_not_there.cute")
    assert "pip install flash-attn-4" in absent.missing()
