"""The benchmarks beside the table: the first call, a whole model's step, the sanitizers. No GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_attn_plugin.cli.bench import speed_module
from hf_attn_plugin.patterns import Pattern
from tests.test_speed import CPU, CountingClock, ours, small

cases, contenders, report = (speed_module(name) for name in ("cases", "contenders", "report"))
compile_tax, in_model = speed_module("compile_tax"), speed_module("in_model")


def test_compiled_kernels_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that compiles for every length is found out; one that does so once is not."""
    monkeypatch.setattr(compile_tax, "SHORT", 80)
    monkeypatch.setattr(compile_tax, "LENGTHS", (100, 150))

    def tax(key: Callable[[Any], str], name: str) -> Any:
        folder = tmp_path / name
        folder.mkdir()

        def prepare(case: Any, pattern: Pattern, device: torch.device) -> Any:
            (folder / f"{key(case)}.cubin").touch()
            return ours(pattern)

        one = contenders.Contender(name, name, prepare, lambda case: None)
        monkeypatch.setattr(compile_tax, "contenders", lambda: {name: one})
        return compile_tax.tax_of(name, small(cases.CASES["documents"]), folder, CPU)

    once = tax(lambda case: case.name, "once")
    assert (once.kernels, once.lengths_kernels, once.layouts_kernels) == (1, 0, 0)
    assert once.good and once.short_kernels == 0
    classes = tax(lambda case: f"{case.length > 90}", "two classes of tiles")
    assert (classes.kernels, classes.short_kernels, classes.lengths_kernels) == (1, 1, 0)
    assert classes.good
    each = tax(lambda case: f"{case.length} {case.seed}", "each")
    assert (each.kernels, each.lengths_kernels, each.layouts_kernels) == (1, 2, 3)
    assert not each.good
    assert not dataclasses.replace(once, first_s=21.0).good
    assert not dataclasses.replace(once, short_s=21.0).good
    header, rows = compile_tax.table([once, each])
    assert header.count("compiled") == 4
    assert rows[1][header.index("compiled")] == "1"


def test_the_loss_in_chunks_is_the_loss() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 37, 8, requires_grad=True)
    weight, labels = torch.randn(11, 8), torch.randint(11, (2, 37))
    whole = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    chunked = in_model.chunked_loss(hidden, weight, labels, chunk=5)
    torch.testing.assert_close(chunked, whole)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (chunked, whole)]
    torch.testing.assert_close(*grads)


def test_a_step_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from transformers import MistralConfig

    def config(layers: int, tokens: int) -> MistralConfig:
        return MistralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokens,
            sliding_window=16,
        )

    monkeypatch.setattr(in_model, "free", lambda device: None)
    monkeypatch.setattr(in_model, "WINDOW", 16)
    monkeypatch.setattr(in_model, "SHAPES", (in_model.Shape("tiny", 1, config),))
    said: list[str] = []

    def run(attentions: list[str]) -> int:
        return in_model.run(
            tmp_path,
            command="hf-attn bench model",
            tokens=48,
            attentions=attentions,
            say=said.append,
            device=CPU,
            clock=CountingClock(),
        )

    assert run(["sdpa", "no_such_attention"]) == 0
    rows = report.Results(tmp_path / "model.json", in_model.StepRow).rows
    status = {row.attention: row.status for row in rows.values()}
    assert status == {
        "sdpa": "ok",
        "no_such_attention": "error",
        "flash": "ok",
        "sliding_window": "ok",
    }
    losses = [row.loss for row in rows.values() if row.status == "ok"]
    assert max(losses) - min(losses) < 0.02  # they compute the same
    assert "| tiny, 1 layers, 48 tokens | flash |" in (tmp_path / "model.md").read_text()
    # A method that attends to other pairs than it says is not timed.
    monkeypatch.setattr(in_model, "check", lambda *a: "layer 0 differs")
    monkeypatch.setattr(in_model, "_stamp", lambda: "another version")
    assert run([]) == 1
    assert "FAILED numerics" in said[-1]
    page = (tmp_path / "model.md").read_text()
    assert "- flash in tiny: FAILED numerics: layer 0 differs" in page


# -- what compute-sanitizer is given ---------------------------------------------------------------


def test_launches_are_small_and_all_kernels_take_them() -> None:
    from hf_attn_plugin.ops.triton.support import refuses_pattern

    launches = speed_module("launches")
    every = [*launches.training_launches(CPU), *launches.decoding_launches(CPU)]
    assert len({launch.name for launch in every}) == len(every)
    for launch in every:
        assert refuses_pattern(launch.pattern) is None
        assert launch.pattern.kv_len < 3000
        assert bool(launch.pattern.visible("cpu").any())
    terms = {name for launch in every for name in launch.pattern.tensors()}
    assert terms == {"global_tokens", "key_valid", "q_documents", "kv_documents"}


def test_sanitizers_are_asked_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that finds nothing in the planted overrun proves nothing."""
    sanitize = speed_module("sanitize")
    with pytest.raises(SystemExit, match="no tool named initchek: choose from memcheck, racecheck"):
        sanitize.run(["initchek"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match="compute-sanitizer is not on the PATH"):
        sanitize.run(["memcheck"])
    monkeypatch.setattr("shutil.which", lambda name: name)
    ran: list[list[str]] = []

    def run(overrun: int, memory: int, race: str, ordered: str, shared: str) -> int:
        def timed(command: list[str]) -> tuple[int, str]:
            ran.append(command)
            if "compute-sanitizer" not in command:
                return 0, ""
            if "memcheck" in command:
                return (overrun if "--overrun" in command else memory), ""
            text = race if "--race" in command else ordered if "--ordered" in command else shared
            return (9 if "Error" in text else 0), text

        monkeypatch.setattr(sanitize, "_timed", timed)
        return sanitize.run(["memcheck", "racecheck"])

    first, call = sanitize.dispatch_lines("races.py", "handing_kernel")
    assert 0 < first < call
    control = races(("handing_kernel", "races.py", first, call))
    planted = races(("handing_kernel", "races.py", call - 20, call - 30))
    name = "hopper_grad_key"
    first, call = sanitize.dispatch_lines(f"{name}.py", f"{name}_kernel")
    dispatch = races((f"{name}_kernel", f"{name}.py", first, call))
    clean = races()
    good = (9, 0, planted, control)
    assert run(*good, clean) == 0
    assert [command[2] for command in ran if "compute-sanitizer" in command] == [
        *("memcheck", "memcheck"),
        *("racecheck", "racecheck", "racecheck"),
    ]
    assert run(*good, dispatch) == 0
    assert run(0, 0, planted, control, dispatch) == 1  # the overrun is not found
    assert run(9, 9, planted, control, dispatch) == 1
    assert run(9, 0, control, control, dispatch) == 1  # the race is not found
    assert run(9, 0, planted, clean, dispatch) == 1  # the control has no such reports
    # Reads at other lines, kernels without partitions, and reports that were cut off.
    assert run(*good, races((f"{name}_kernel", f"{name}.py", first - 1, call))) == 1
    assert run(*good, races(("merge_blocks_kernel", "hopper_rows.py", first, call))) == 1
    assert run(*good, dispatch.replace("1 hazards displayed", "2 hazards displayed")) == 1


def races(*reports: tuple[str, str, int, int]) -> str:
    """What racecheck prints: kernel, file, line of a read, and of a write."""
    lines = ["========= COMPUTE-SANITIZER"]
    for kernel, file, read, write in reports:
        place = f"access at {kernel}+0x1a0 in {file}"
        lines.append(f"========= Error: Race reported between Read {place}:{read}")
        lines.append(f"=========     and Write {place}:{write} [4 hazards]")
    count = len(reports)
    summary = f"{count} hazards displayed ({count} errors, 0 warnings)"
    return "\n".join([*lines, f"========= RACECHECK SUMMARY: {summary}"])
