"""How far linear attention is from softmax in a trained model, on real text.

    python eval/linear_error.py --model quickstart-out/model --text quickstart-out/text/held_out.txt

Every layer is given the inputs it has in the softmax model; its output under ``linear``, behind the
output projection, is compared with that under softmax. FAVOR+ is drawn with several seeds. With
--linearized the results of recipes/linearize.py are added to the page.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attn_plugin import LinearConfig, configure
from hf_attn_plugin.convert.linearize import attention_output_errors


def batches(tokenizer: Any, text: str, length: int, rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of `length` tokens, spread evenly over the text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
    if len(ids) < rows * length:
        raise ValueError(f"the text has {len(ids)} tokens; {rows} rows of {length} need more.")
    for start in range(0, rows * (len(ids) // rows), len(ids) // rows):
        yield {"input_ids": ids[None, start : start + length]}


def measure(args: argparse.Namespace) -> list[tuple[str, list[float], float]]:
    """Name, mean error of each layer, and the spread of their mean over the seeds."""
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="flash").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = list(batches(tokenizer, Path(args.text).read_text("utf-8"), args.length, args.rows))
    table = []
    for number in (None, *args.features):
        runs = []
        for seed in range(1 if number is None else args.seeds):
            parameters = LinearConfig()
            if number is not None:
                parameters = LinearConfig("favor", num_features=number, seed=seed)
            configure(model, parameters)
            runs.append(attention_output_errors(model, rows))
        means = [statistics.fmean(layer) for layer in zip(*runs, strict=True)]
        overall = [statistics.fmean(run) for run in runs]
        spread = statistics.stdev(overall) if len(runs) > 1 else 0.0
        table.append(("elu" if number is None else f"favor, {number} features", means, spread))
        print(f"{table[-1][0]}: {statistics.fmean(means):.3f} ± {spread:.3f}", flush=True)
    return table


def write(args: argparse.Namespace, table: list[tuple[str, list[float], float]]) -> None:
    """The page of results."""
    layers = len(table[0][1])
    command = shlex.join(["python", *sys.argv])
    lines = [
        "# Linear attention: error against softmax",
        "",
        f"Made by `{command}`.",
        "",
        f"{args.rows} rows of {args.length} tokens of held-out text, {args.seeds} draws of the "
        "random features. Relative error of each layer's attention output, given the softmax "
        "model's inputs.",
        "",
        "| features | all layers | " + " | ".join(f"layer {i}" for i in range(layers)) + " |",
        "|---|---|" + "---|" * layers,
    ]
    for name, means, spread in table:
        overall = f"{statistics.fmean(means):.3f}" + (f" ± {spread:.3f}" if spread else "")
        lines.append(f"| {name} | {overall} | " + " | ".join(f"{m:.3f}" for m in means) + " |")
    for file in args.linearized:
        lines += ["", *linearized(json.loads(Path(file).read_text("utf-8")))]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(out)


def linearized(results: dict[str, Any]) -> list[str]:
    """A section with what recipes/linearize.py has measured."""
    names = {
        "loss_softmax": "softmax",
        "loss_linear": "linear, before",
        "loss_distilled": "linear, after distillation",
        "loss_finetuned": "linear, after fine-tuning",
    }
    missing = ", ".join(names[key] for key in names if key not in results)
    if missing:
        raise ValueError(
            f"`{results['command']}` has not measured: {missing}. Run the same line again: it goes "
            "on from its last checkpoint."
        )
    errors = {"loss_linear": "errors_before", "loss_distilled": "errors_after"}
    lines = [
        f"## Linearised, {results['features']}",
        "",
        f"Made by `{results['command']}`.",
        "",
        "| | loss on held-out text | error of each layer's attention output |",
        "|---|---|---|",
    ]
    for key, name in names.items():
        layers = results.get(errors.get(key, ""), [])
        cells = ", ".join(f"{error:.3f}" for error in layers)
        lines.append(f"| {name} | {results[key]:.3f} | {cells} |")
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal LM")
    parser.add_argument("--text", required=True, help="text that the model was not trained on")
    parser.add_argument("--features", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=3, help="draws of the random features")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--linearized", nargs="*", default=[], help="linearize_results.json …")
    parser.add_argument("--out", default="eval/results/linear.md")
    args = parser.parse_args()
    write(args, measure(args))


if __name__ == "__main__":
    main()
