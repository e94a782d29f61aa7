"""Compare ways to merge key/value heads, right after the conversion and after uptraining.

    python eval/gqa_study.py MODEL --text FILE... --original-steps 6000 --device cuda

MODEL is a folder with a multi-head model and its tokenizer, FILE text like that it was trained on
(or token ids, *.npy). Every method converts to half, a quarter and one of the key/value heads, is
measured on held-out text, and then trains on for 5 % of the original steps: all cells with the same
rows in the same order, the model that was not converted too. `random` runs with several seeds.
Each finished cell is kept in gqa.json in --out, so that the same line again goes on; the table
gqa.md and the picture gqa.png are written from it. On CUDA everything runs in bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attn_plugin.convert import to_gqa
from hf_attn_plugin.convert.gqa_layers import Conversion

METHODS = ("mean", "first", "random", "aligned", "aligned+calibration")
UNCONVERTED = "not converted"
_CALIBRATION_ROWS = 32


@dataclass(frozen=True)
class Cell:
    """One conversion and what follows.

    Attributes:
        method: One of `METHODS`, or `UNCONVERTED`.
        heads: Key/value heads afterwards.
        seed: Of the conversion; more than one for `random` only.
    """

    method: str
    heads: int
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the cell among the results."""
        return f"{self.method}/{self.heads}/{self.seed}"


class Text:
    """Rows of token ids, in the order in which every cell sees them.

    Args:
        tokens: All of them.
        length: Tokens per row.
        held_out_rows: Rows that are put aside at the end.
        seed: Of the order of the rest.
    """

    def __init__(self, tokens: Tensor, length: int, held_out_rows: int, seed: int) -> None:
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        if len(rows) <= held_out_rows:
            raise ValueError(
                f"{len(tokens)} tokens are {len(rows)} rows of {length}, of which {held_out_rows} "
                f"are held out: give more text, or a smaller --length or --held-out-rows"
            )
        self.held_out = rows[-held_out_rows:]
        self._train = rows[:-held_out_rows]
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(self._train), generator=generator)

    def batch(self, step: int, size: int) -> Tensor:
        """The rows of a step, from the beginning again when all have been seen."""
        index = torch.arange(step * size, (step + 1) * size) % len(self._order)
        return self._train[self._order[index]]

    def calibration(self) -> list[Tensor]:
        """Training rows that no step comes to before all others."""
        return list(self._train[self._order[-_CALIBRATION_ROWS:]].split(4))


class Study:
    """Runs the cells that are not there yet."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.steps = args.steps or math.ceil(0.05 * args.original_steps)
        self.text = Text(
            _read_tokens(args.model, args.text), args.length, args.held_out_rows, args.seed
        )
        self.base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.heads = self.base.config.get_text_config().num_key_value_heads
        self.file = args.out / "gqa.json"
        settings = {
            "model": Path(args.model).name, "text": [Path(t).name for t in args.text],
            "device": _device_name(args.device), "length": args.length, "steps": self.steps,
            "batch_size": args.batch_size, "learning_rate": args.learning_rate,
            "held_out_rows": args.held_out_rows, "seed": args.seed,
        }  # fmt: skip
        self.results: dict[str, Any] = {"settings": settings, "cells": {}}
        if self.file.exists() and not args.fresh:
            kept = json.loads(self.file.read_text())
            if kept["settings"] != settings:
                raise ValueError(
                    f"{self.file} was measured with {kept['settings']}, asked is {settings}: "
                    f"use --fresh to measure anew, or another --out"
                )
            self.results = kept

    def cells(self) -> list[Cell]:
        """All cells, those that a reader waits for first."""
        counts = [self.heads // 2, self.heads // 4, 1] if not self.args.heads else self.args.heads
        counts = list(dict.fromkeys(n for n in counts if n >= 1))
        for count, name in itertools.product(counts, self.args.methods):
            # Refuses before any time is spent.
            Conversion(type(self.base), self.base.config, count, name.partition("+")[0])
        cells = [Cell(UNCONVERTED, self.heads)]
        for count in counts:
            for method in self.args.methods:
                seeds = range(self.args.random_seeds) if method == "random" else (0,)
                cells += [Cell(method, count, seed) for seed in seeds]
        return cells

    def run(self) -> None:
        """Measure every cell that has no result yet."""
        cells = self.cells()
        if "before" not in self.results:
            self.results["before"] = self._loss(copy.deepcopy(self.base).to(self.args.device))
            self._save()
        for cell in tqdm(cells, desc="cells"):
            if cell.key in self.results["cells"]:
                continue
            started = time.perf_counter()
            # The kernels of a step are the same for all, so is what they draw.
            torch.manual_seed(self.args.seed)
            model = self._converted(cell)
            converted = self._loss(model)
            self._train(model)
            self.results["cells"][cell.key] = {
                **asdict(cell),
                "converted": converted,
                "uptrained": self._loss(model),
                "seconds": round(time.perf_counter() - started, 1),
            }
            self._save()

    def _converted(self, cell: Cell) -> Any:
        model = copy.deepcopy(self.base)
        if cell.method == UNCONVERTED:
            return model.to(self.args.device)
        method, _, calibrated = cell.method.partition("+")
        batches = None
        if calibrated:
            model.to(self.args.device)
            rows = self.text.calibration()
            batches = [{"input_ids": r.to(self.args.device), "use_cache": False} for r in rows]
        to_gqa(model, cell.heads, method, seed=cell.seed, calibration=batches)  # type: ignore[arg-type]
        return model.to(self.args.device)

    def _token_losses(self, model: Any, rows: Tensor) -> Tensor:
        device = self.args.device
        rows = rows.to(device)
        cuda = torch.device(device).type == "cuda"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    @torch.no_grad()
    def _loss(self, model: Any) -> float:
        model.eval()
        parts = self.text.held_out.split(self.args.batch_size)
        losses = [float(self._token_losses(model, part)) * len(part) for part in parts]
        return sum(losses) / len(self.text.held_out)

    def _train(self, model: Any) -> None:
        args, steps = self.args, self.steps
        model.train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        warmup = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, max(0.05, 1 - step / steps)),
        )
        for step in tqdm(range(steps), leave=False):
            loss = self._token_losses(model, self.text.batch(step, args.batch_size))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

    def _save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.file)


def _read_tokens(model: str, files: list[str]) -> Tensor:
    parts = []
    tokenizer: Any = None
    for file in files:
        if file.endswith(".npy"):
            parts.append(torch.from_numpy(np.load(file).astype(np.int64)))
            continue
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(ids))
    return torch.cat(parts)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def summarize(results: dict[str, Any]) -> dict[int, dict[str, dict[str, tuple[float, float]]]]:
    """Mean and standard deviation over seeds, by heads, method and moment."""
    groups: dict[int, dict[str, list[dict[str, float]]]] = {}
    for cell in results["cells"].values():
        groups.setdefault(cell["heads"], {}).setdefault(cell["method"], []).append(cell)
    return {
        heads: {
            method: {
                moment: (
                    statistics.fmean(c[moment] for c in cells),
                    statistics.stdev(c[moment] for c in cells) if len(cells) > 1 else 0.0,
                )
                for moment in ("converted", "uptrained")
            }
            for method, cells in methods.items()
        }
        for heads, methods in sorted(groups.items(), reverse=True)
    }


def table(results: dict[str, Any], command: str) -> str:
    """The results as a page of Markdown."""
    settings, summary = results["settings"], summarize(results)
    trained_on = next(
        (m[UNCONVERTED]["uptrained"][0] for m in summary.values() if UNCONVERTED in m), math.nan
    )
    lines = [
        f"<!-- Written by `{command}` -->",
        "",
        "# Merging key/value heads",
        "",
        f"Loss in nats per token on {settings['held_out_rows']} rows of {settings['length']} "
        f"tokens of held-out text; {settings['steps']} steps of {settings['batch_size']} rows "
        f"after the conversion, learning rate {settings['learning_rate']}, on "
        f"{settings['device']}. Before the conversion: **{results['before']:.4f}**. The last "
        f"column is the distance to the model that was not converted and trained on alike; seeds "
        f"of `random` as mean ± standard deviation.",
        "",
        "| KV heads | method | after conversion | after uptraining | above not converted |",
        "|---|---|---|---|---|",
    ]
    for heads, methods in summary.items():
        for method, moments in methods.items():
            shown = [
                f"{mean:.4f}" + (f" ± {spread:.4f}" if spread else "")
                for mean, spread in (moments["converted"], moments["uptrained"])
            ]
            gap = "" if method == UNCONVERTED else f"{moments['uptrained'][0] - trained_on:.4f}"
            lines.append(f"| {heads} | {method} | {shown[0]} | {shown[1]} | {gap} |")
    return "\n".join(lines) + "\n\n![Loss over key/value heads](gqa.png)\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """The loss over the number of heads, after conversion and after uptraining."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = summarize(results)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"converted": "right after the conversion", "uptrained": "after uptraining"}
    for panel, (moment, title) in zip(panels, titles.items(), strict=True):
        for method in METHODS:
            points = [(h, m[method][moment]) for h, m in summary.items() if method in m]
            if points:
                panel.errorbar(
                    [heads for heads, _ in points],
                    [mean for _, (mean, _) in points],
                    yerr=[spread for _, (_, spread) in points],
                    marker="o",
                    capsize=3,
                    label=method,
                )
        panel.axhline(results["before"], color="black", linestyle=":", label="before")
        for methods in summary.values():
            if UNCONVERTED in methods and moment == "uptrained":
                level = methods[UNCONVERTED][moment][0]
                panel.axhline(
                    level, color="gray", linestyle="--", label="not converted, trained on"
                )
        counts = sorted(h for h, m in summary.items() if set(m) - {UNCONVERTED})
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_xlabel("key/value heads")
        panel.set_ylabel("loss, nats per token")
        panel.set_title(title)
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the study and write its table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a multi-head model")
    parser.add_argument(
        "--text", nargs="+", required=True, help="text files, or token ids as *.npy"
    )
    parser.add_argument("--original-steps", type=int, help="steps that the model was trained for")
    parser.add_argument(
        "--steps", type=int, help="steps after conversion, instead of 5 %% of those"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument("--heads", type=int, nargs="+", help="instead of half, a quarter and 1")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--fresh", action="store_true", help="forget the cells in --out")
    args = parser.parse_args(arguments)
    if not (args.steps or args.original_steps):
        parser.error("give --original-steps, or --steps")

    study = Study(args)
    study.run()
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "eval/gqa_study.py", *given])
    text = table(study.results, command)
    (args.out / "gqa.md").write_text(text, encoding="utf-8")
    draw(study.results, args.out / "gqa.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
