"""``hf-attn bench ring`` without a GPU: its own parts, and the command over gloo."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_attn_plugin import attention
from hf_attn_plugin.cli.bench import speed_module
from hf_attn_plugin.cli.main import main
from tests.parallel.processes import run_processes

ring, ring_cases, report = (speed_module(name) for name in ("ring", "ring_cases", "report"))
ring_attention, numerics = speed_module("ring_attention"), speed_module("numerics")
ring_report, ring_traffic = speed_module("ring_report"), speed_module("ring_traffic")
ring_model, ring_team = speed_module("ring_model"), speed_module("ring_team")
ring_contenders = speed_module("ring_contenders")

CPU = torch.device("cpu")
OURS = ("one GPU", "chosen", "gather", "ring", "ulysses")


def silent(line: str) -> None:
    pass


# -- the command -----------------------------------------------------------------------------------


def test_the_whole_command_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two processes start, agree, and leave the table, the page and the timeline's picture."""
    pytest.importorskip("matplotlib")
    line = ["bench", "ring", "causal-short", "--device", "cpu", "--ranks", "2"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    said = capfd.readouterr()
    assert "ranks 2, device CPU" in said.err
    rows = {
        row["contender"]: row for row in json.loads((tmp_path / "ring.json").read_text())["rows"]
    }
    assert tuple(rows) == OURS
    for name, row in rows.items():
        assert row["status"] == "ok" and row["ranks"] == 2, row
        assert 0.01 < row["budget"] <= 1  # bfloat16 has errors: something was compared
        assert row["error_ratio"] is None if name == "one GPU" else row["error_ratio"] < 1.1
    # Half of q, k, v and the output, forward, and of their gradients; 2 bytes each.
    assert rows["ulysses"]["sent_bytes"] == 2 * (8 + 4 + 4 + 8) * 256 * 16 // 2 * 2
    assert rows["ulysses"]["efficiency"] == pytest.approx(
        rows["one GPU"]["total_ms"] / rows["ulysses"]["total_ms"] / 2
    )
    assert f"{rows['ring']['total_ms']:.2f}" in said.out
    assert (tmp_path / "ring_timeline.png").stat().st_size > 5_000
    page = (tmp_path / "ring.md").read_text()
    assert "| ring |" in page and "![timeline](ring_timeline.png)" in page
    assert "ulysses on causal, S=512: " in page  # how it is spread


def both(rank: int, out: str) -> tuple[Any, Any]:
    return wrong_and_kept(rank, out), steps(rank, out)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """What two processes return; starting them takes longer than all they do."""
    out = tmp_path_factory.mktemp("measured")
    return (out, *run_processes(both, 2, str(out), limit_s=100)[0])


def wrong_and_kept(rank: int, out: str) -> list[tuple[str, str, bool]]:
    """A schedule that forgets to be causal, another that breaks, and a second run."""
    team = ring_team.Team(rank, 2, CPU)
    wanted = {one.name: one for one in ring_contenders.chosen_contenders([])}
    gather = wanted["gather"]

    def blind(case: Any, pattern: Any, team: Any) -> Any:
        return gather.spread(case, pattern.replace(causal=False), team)

    def broken(case: Any, pattern: Any, team: Any) -> Any:
        raise NotImplementedError(f"not\nhere {team.rank}")

    entrants = [
        wanted["one GPU"],
        gather,
        dataclasses.replace(gather, name="blind", spread=blind),
        dataclasses.replace(gather, name="broken", spread=broken),
    ]
    said: list[tuple[str, str, bool]] = []
    for names in (entrants, entrants[:2]):
        bench = ring_attention.RingBench(
            team,
            ring_team.WallClock(),
            report.Results(Path(out) / "rows.json", ring_report.RingRow),
            ring_report.Timelines(Path(out) / "lanes.json"),
            rounds=1,
        )
        cases = ring_cases.chosen_cases(("causal-short",), 2, tiny=True)
        rows = bench.run(cases, names)
        said += [(row.contender, row.status, ring_report.bad([row])) for row in rows]
        times = [row.total_ms for row in rows if row.contender == "gather"]
        said += [("gather took", str(times[0]), False)]
    return said


def test_wrong_numbers_get_no_time_and_right_ones_are_kept(
    measured: tuple[Path, Any, Any],
) -> None:
    out, said, _ = measured
    assert [entry for entry in said if entry[0] != "gather took"] == [
        ("one GPU", "ok", False),
        ("gather", "ok", False),
        ("blind", "FAILED numerics", True),
        ("broken", "error", True),
        ("one GPU", "ok", False),
        ("gather", "ok", False),
    ]
    first, again = (text for name, text, _ in said if name == "gather took")
    assert first == again  # to the last digit: it was not measured twice
    rows = json.loads((out / "rows.json").read_text())["rows"]
    details = {row["contender"]: row["detail"] for row in rows}
    assert "times the error that is allowed" in details["blind"]
    assert details["broken"] == "rank 0: NotImplementedError: not … here 0"
    assert {row["contender"] for row in rows if row["total_ms"] is None} == {"blind", "broken"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "4"], "needs 4 of them; torch"),
        ([], "needs two or more of them; torch"),
    ],
)
def test_gpus_are_asked_for(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["bench", "ring", *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "finds 1 here" in error
    assert not (tmp_path / "out").exists()


def test_under_torchrun_its_number_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_team, "by_torchrun", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ring_team.check_ranks(None, "cuda") == 4
    with pytest.raises(ValueError, match="--ranks 2, but torchrun started 4 processes"):
        ring_team.check_ranks(2, "cuda")


def test_cases_divide_among_any_number_of_ranks() -> None:
    for ranks in (2, 3, 6, 8):
        for tiny in (False, True):
            for case in ring_cases.chosen_cases((), ranks, tiny=tiny):
                short = ring_cases.gate_case(case, ranks)
                assert case.length % (8 * ranks) == short.length % (8 * ranks) == 0
                assert short.length <= case.length
                assert case.window is None or short.length > case.window
    ulysses, case = ring_contenders.ring_contenders()["ulysses"], ring_cases.CASES["causal"]
    assert ulysses.refuses(case, 2) is None
    assert "32 heads do not divide among 3 ranks" in ulysses.refuses(case, 3)
    whole = {case.name: case.length for case in ring_cases.chosen_cases((), 2)}
    assert whole["causal"] == 131072 and whole["window"] == 262144


# -- what is sent, and when ------------------------------------------------------------------------


def test_bytes_of_collectives() -> None:
    ten, twenty = torch.zeros(10), torch.zeros(20)
    sent = ring_traffic.bytes_of
    assert sent("send", ([ten], None, 1), 4) == 40
    assert sent("recv_", ([ten], None, 1), 4) == 0
    assert sent("_allgather_base_", (twenty, ten), 4) == 120
    assert sent("all_gather_into_tensor", (ten, 4, "g"), 4) == 120
    assert sent("_reduce_scatter_base_", (ten, twenty), 4) == 60
    assert sent("allreduce_", ([twenty],), 4) == 120
    assert sent("alltoall_base_", (twenty, twenty), 4) == 60
    assert sent("all_to_all_single", (twenty, [0, 20], [0, 20], "g"), 2) == 80  # all of it moves
    with pytest.raises(ValueError, match="what mystery_ sends is not known"):
        sent("mystery_", (ten,), 4)


def test_the_share_of_transfers_that_is_hidden() -> None:
    """By hand: 10 of 40 µs under computation, 20 µs once both kernels at once are one span."""
    events = [
        ("ncclDevKernel_AllReduce_Sum_f32", (0.0, 90.0)),  # the ranks wait for each other
        ("fill", (50.0, 60.0)),
        ("nccl:send", (100.0, 300.0)),
        ("gemm", (100.0, 120.0)),
        ("gemm", (110.0, 130.0)),
        ("ncclDevKernel_SendRecv", (120.0, 160.0)),
        ("gemm", (170.0, 180.0)),
    ]
    timeline = ring_traffic.reduce_events(events, on_gpu=True)
    assert timeline.computing == ((0.0, 30.0), (70.0, 80.0))
    assert timeline.moving == ((20.0, 60.0),)
    assert timeline.hidden == pytest.approx(10 / 40)
    assert timeline.busy == pytest.approx(40 / 80)
    assert ring_traffic.reduce_events(events[3:5], on_gpu=True).hidden is None


# -- numbers and pages -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
def test_results_of_a_whole_sequence_are_judged(sampled: bool) -> None:
    case = ring_cases.chosen_cases(("window",), 2, tiny=True)[0].at(256)
    pattern = case.pattern("cpu")
    inputs = numerics.Inputs.random(
        batch=1, heads=8, kv_heads=4, tokens=256, head_dim=16, dtype=torch.bfloat16, device="cpu"
    )
    gate = numerics.Gate(inputs, pattern, numerics.sample_rows(256, "cpu") if sampled else None)
    got = numerics.results_of(lambda q, k, v: attention(q, k, v, pattern)[0], inputs, gate.grad)
    verdict, errors = ring_attention.judged(gate, got)
    assert verdict.good and set(errors) == set(got)
    assert all(1e-4 < error < 1e-2 for error in errors.values())
    # As a ring that loses what the last rank's queries say of the first rank's keys.
    lost = {**got, "key gradient": got["key gradient"].clone()}
    lost["key gradient"][:, :, 100:104] *= 0.5
    assert not ring_attention.judged(gate, lost)[0].good
    noise = {**got, "query gradient": got["query gradient"] + 1e-3}  # allowed where one is
    assert ring_attention.judged(gate, noise)[0].good is not sampled


def test_timelines_are_kept_and_what_has_none_is_said(tmp_path: Path) -> None:
    lanes = ring_traffic.Timeline(((0.0, 10.0),), ((5.0, 25.0),))
    ring_report.Timelines(tmp_path / "lanes.json").add("causal", {"ring": lanes})
    assert ring_report.Timelines(tmp_path / "lanes.json").kept == {"causal": {"ring": lanes}}
    row = ring_report.RingRow("window", "window", 64, 2, "cp-flash", False, "cannot", "no mask")
    assert ring_report.ring_notes([row]) == ["cp-flash: window: cannot: no mask"]
    assert not ring_report.bad([row])
    assert ring_report.bad([dataclasses.replace(row, status="FAILED numerics")])
    assert ring_report.ring_table([row])[1] == [["cp-flash", "cannot", *["-"] * 11]]


# -- a model's step --------------------------------------------------------------------------------


def test_losses_of_tokens() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 37, 8, requires_grad=True), torch.randn(11, 8)
    labels = torch.randint(11, (1, 37))
    labels[0, -1] = -100
    whole = torch.nn.functional.cross_entropy((hidden @ weight.T)[0], labels[0], reduction="none")
    losses = ring_model.token_losses(hidden, weight, labels, chunk=5)
    torch.testing.assert_close(losses[0], whole)
    assert losses[0, -1] == 0
    (want,), (got,) = (torch.autograd.grad(x.sum(), hidden) for x in (whole, losses))
    torch.testing.assert_close(got, want)


def steps(rank: int, out: str) -> tuple[list[Any], bool]:
    team = ring_team.Team(rank, 2, CPU)
    results = report.Results(Path(out) / "steps.json", ring_model.StepRow)
    rows, failed = ring_model.run_models(team, ring_team.WallClock(), results, say=silent)
    return [dataclasses.asdict(row) for row in rows], failed


def test_steps_of_models(measured: tuple[Path, Any, Any]) -> None:
    rows, failed = measured[2]
    assert not failed, rows
    mistral, llama = rows
    assert "window" in mistral["model"]
    for row in rows:
        assert row["error"] < 1e-5 and row["sent_gib"] > 0 and row["seconds"] > 0
        assert row["loss"] == pytest.approx(4.57, abs=0.3)  # of 97 words, random: log 97
    assert llama["accelerate"] == "takes it"
    assert "refuses: Context parallelism does not support" in mistral["accelerate"]
    header, cells = ring_model.step_table([ring_model.StepRow(**row) for row in rows])
    assert len(header) == len(cells[0]) and "512 tokens" in cells[0][0]
