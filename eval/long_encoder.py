"""Time and memory of an encoder converted by to_long_encoder, beside dense attention.

    python eval/long_encoder.py                       # 2 CPU cores, a minute or two
    python eval/long_encoder.py --device cuda --layers 12 --dtype bfloat16

Layers of RoBERTa-base's shape, randomly initialised, at --length tokens. Before anything is timed,
the converted encoder's output and gradients at a shorter length are compared with eager attention
under the same mask in float64; a failing case is refused. Time is the median of interleaved
repeats. Memory is, on a CPU, the rise of a process's peak (a process per case), and on a GPU the
allocator's peak; both above the weights, with the gradients included. The table goes to
eval/results/long_encoder.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from hf_attn_plugin.convert import to_long_encoder

ATTENTIONS = ("longformer", "sdpa", "eager")
MODES = ("forward", "forward + backward")
RESULT = Path(__file__).parent / "results" / "long_encoder.md"


def make(args: argparse.Namespace, length: int, attention: str) -> Any:
    """The converted encoder, with the wanted attention."""
    torch.manual_seed(0)
    config = RobertaConfig(
        num_hidden_layers=args.layers,
        max_position_embeddings=514,
        vocab_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = RobertaModel(config, add_pooling_layer=False).eval()
    to_long_encoder(model, max(length, 512), args.window)
    model.set_attn_implementation(attention)
    return model.to(args.device, getattr(torch, args.dtype))


def token_ids(length: int, device: str) -> Tensor:
    """A batch of one."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(4, 1024, (1, length), generator=generator).to(device)


def run(model: Any, ids: Tensor, mode: str, mask: Tensor | None = None) -> Tensor:
    """The last hidden state."""
    if mode == "forward":
        with torch.no_grad():
            return model(ids, attention_mask=mask).last_hidden_state
    output = model(ids, attention_mask=mask).last_hidden_state
    output.sin().sum().backward()
    return output.detach()


def check(args: argparse.Namespace) -> dict[str, float]:
    """Errors against float64, as a share of the largest value; refuses a failing case.

    The budget is that of the tests: twice the error of eager attention in the same dtype, and a
    rounding floor.
    """
    length = min(args.length, 2 * args.window + 61)
    ids = token_ids(length, args.device)
    index = torch.arange(length, device=args.device)
    seen = (index[:, None] - index).abs() < args.window
    seen[0] = seen[:, 0] = True  # the global token
    ours = make(args, length, "longformer")
    eager = copy.deepcopy(ours)
    eager.set_attn_implementation("eager")
    exact = copy.deepcopy(eager).double()

    def results(model: Any, drawn: bool) -> dict[str, Tensor]:
        dtype = next(model.parameters()).dtype
        low = torch.finfo(dtype).min
        mask = torch.zeros(1, 1, length, length, dtype=dtype, device=args.device)
        mask.masked_fill_(~seen, low)
        output = run(model, ids, MODES[1], mask if drawn else None)
        query = model.encoder.layer[0].attention.self.query.weight.grad
        return {"output": output.double(), "query gradient": query.double()}

    truth = results(exact, True)
    plain, found = results(eager, True), results(ours, False)
    errors = {}
    for name, value in truth.items():
        scale = float(value.abs().max())
        error = float((found[name] - value).abs().max())
        floor = 8 * torch.finfo(getattr(torch, args.dtype)).eps * scale
        budget = 2 * float((plain[name] - value).abs().max()) + floor
        if not error <= budget:
            raise SystemExit(f"refused: {name} is off by {error:.1e}, allowed is {budget:.1e}")
        errors[name] = error / scale
    return errors


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.accelerator.synchronize()


def times(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds by mode and attention; the attentions take turns."""
    ids = token_ids(args.length, args.device)
    models = {name: make(args, args.length, name) for name in ATTENTIONS}
    medians: dict[str, dict[str, float]] = {}
    for mode in MODES:
        seconds: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                model.zero_grad()
                synchronize(args.device)
                start = time.perf_counter()
                run(model, ids, mode)
                synchronize(args.device)
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
        medians[mode] = {name: statistics.median(values) for name, values in seconds.items()}
    return medians


def memory(args: argparse.Namespace) -> float:
    """Megabytes above the weights that one case needs at its peak, in this process."""
    mode, name = args.only
    model = make(args, args.length, name)
    if args.device == "cpu":
        run(model, token_ids(8, "cpu"), mode)  # libraries loaded, gradients allocated
        model.zero_grad()
        ids = token_ids(args.length, "cpu")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held
        before = peak_bytes()
        run(model, ids, mode)
        return (peak_bytes() - before) / 1e6
    ids = token_ids(args.length, args.device)
    run(model, ids, mode)
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(model, ids, mode)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_bytes() -> int:
    """The process's highest resident memory since it was last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def table(args: argparse.Namespace) -> str:
    """All of it as Markdown."""
    errors = check(args)
    seconds = times(args)
    command = "python eval/long_encoder.py " + " ".join(sys.argv[1:])
    place = (
        f"{torch.get_num_threads()} CPU threads"
        if args.device == "cpu"
        else torch.cuda.get_device_name()
    )
    lines = [
        f"Made by `{command.strip()}`: {args.layers} layer(s) of RoBERTa-base's shape,",
        f"{args.length:,} tokens, batch 1, {args.dtype}, {place}, torch {torch.__version__}.",
        "",
        f"`longformer` with window {args.window} ({2 * args.window - 1} keys), one global token,",
        "checked against float64 before it was timed: error "
        + ", ".join(f"{error:.1e} ({name})" for name, error in errors.items())
        + ".",
        "Time is the median of "
        f"{args.repeats} interleaved repeats; memory is the peak above the weights.",
        "",
        "| attention | pass | seconds | times `longformer` | memory, MB | times `longformer` |",
        "|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        megabytes = {}
        for name in ATTENTIONS:
            line = [sys.executable, __file__, *sys.argv[1:], "--only", mode, name]
            answer = subprocess.run(line, check=True, capture_output=True)
            megabytes[name] = json.loads(answer.stdout)
        for name in ATTENTIONS:
            second, size = seconds[mode][name], megabytes[name]
            slower = second / seconds[mode]["longformer"]
            larger = size / megabytes["longformer"]
            lines.append(
                f"| {name} | {mode} | {second:.3g} | {slower:.2f} | {size:,.0f} | {larger:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256, help="257 is the paper's 512")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(memory(args)))
        return
    text = table(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
