"""``hf-attn sweep``: quality against bytes of KV cache read, for many settings of every method."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hf_attn_plugin.cli.loading import check_device, check_dtype, load_config
from hf_attn_plugin.config import head_dim_of
from hf_attn_plugin.lm_eval import sweep, sweep_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "draw quality against KV cache bytes for SparQ's settings and its baselines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the tasks and what is tried."""
    parser.description = (
        f"Writes {sweep.RESULTS}, sweep.md and sweep.png to DIR. Started again with the same line, "
        "it goes on with what is not measured yet."
    )
    parser.add_argument("model", metavar="MODEL", help="name on the Hub or folder")
    parser.add_argument(
        "--tasks",
        default="niah,repetition,long_bpb,sparq_squad",
        metavar="NAMES",
        help="lm-eval tasks, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--metadata", type=json.loads, default={}, metavar="JSON", help="options of the tasks"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="TASK=NAME",
        help="the metric that counts (default: each task's first)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--device", metavar="NAME", help="default: cuda where there is some")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="default: as saved")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens, to go beyond what the config says"
    )
    tried = parser.add_argument_group("what is tried (lists separated by commas; '' for none)")
    tried.add_argument("--ranks", type=_integers, default=sweep.RANKS, metavar="R,…")
    tried.add_argument("--top-ks", type=_integers, default=sweep.TOP_KS, metavar="K,…")
    tried.add_argument("--coverages", type=_numbers, default=sweep.COVERAGES, metavar="SHARE,…")
    tried.add_argument("--key-copies", type=_words, default=sweep.KEY_COPIES, metavar="KIND,…")
    tried.add_argument("--baselines", type=_words, default=sweep.BASELINES, metavar="NAME,…")
    tried.add_argument(
        "--mean-value-reallocation",
        action="store_true",
        help="SparQ's option, as the paper has it for models without grouped KV heads",
    )
    parser.add_argument(
        "--budgets",
        type=_fractions,
        default=sweep_report.BUDGETS,
        metavar="1/N,…",
        help="shares of dense attention's bytes to name the best settings for",
    )


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then write the report and the picture."""
    counts = (args.batch_size, args.limit, args.max_length)
    if min(count for count in counts if count is not None) < 1:
        raise ValueError("--batch-size, --limit and --max-length must be at least 1.")
    if not all(0 < budget <= 1 for budget in args.budgets):
        raise ValueError("--budgets must be shares above 0 and at most 1, such as 1/2,1/4.")
    check_dtype(args.dtype)
    if args.device is not None:
        check_device(args.device)
    if not isinstance(args.metadata, dict):
        raise ValueError("--metadata must be a JSON object {task: {option: value}}.")
    metrics = dict(_metric(text) for text in args.metric)
    head_dim = head_dim_of(load_config(args.model))
    if head_dim is None:
        raise ValueError(f"{args.model}: the config does not tell the width of an attention head.")
    settings = sweep.sweep_settings(
        head_dim,
        ranks=args.ranks,
        top_ks=args.top_ks,
        coverages=args.coverages,
        key_copies=args.key_copies,
        baselines=args.baselines,
        mean_value_reallocation=args.mean_value_reallocation,
    )
    results = sweep.SweepResults(args.out)
    from hf_attn_plugin.lm_eval import load_tasks

    model, tokenizer = _load(args)
    text_config: Any = model.config.get_text_config()
    max_length = args.max_length or getattr(text_config, "max_position_embeddings", None)
    tasks = load_tasks(tokenizer, args.tasks, args.metadata, max_length)
    steps = sweep.run_sweep(
        model,
        tokenizer,
        tasks,
        settings,
        results,
        command=shlex.join(["hf-attn", *sys.argv[1:]]),
        metrics=metrics,
        limit=args.limit,
        batch_size=args.batch_size,
        max_length=max_length,
    )
    missing = sum(
        results.measurement(setting, task.task_name) is None
        for setting in settings
        for task in tasks
    )
    with tqdm(total=missing, unit="run") as bar:
        for setting, task in steps:
            bar.set_description(f"{task}: {setting.label}")
            bar.update()
    for path in write_report(results, args.out, args.budgets):
        print(path)
    return 0


def write_report(
    results: sweep.SweepResults, folder: Path, budgets: tuple[Fraction, ...]
) -> tuple[Path, Path]:
    """Write ``sweep.md`` and ``sweep.png`` from what has been measured; returns their paths."""
    from hf_attn_plugin.hub.sweep_figures import sweep_figure

    sweeps = sweep_report.read_sweep(results.content)
    model = "/".join(Path(results.content["about"]["model"]).parts[-2:])
    picture = sweep_figure(
        sweeps, folder / "sweep.png", title=f"Quality against KV cache read: {model}"
    )
    report = folder / "sweep.md"
    text = sweep_report.sweep_markdown(results.content, budgets, picture.name)
    report.write_text(text, encoding="utf-8")
    return report, picture


def _load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(args.model)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _words(text))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in _words(text))


def _fractions(text: str) -> tuple[Fraction, ...]:
    try:
        return tuple(Fraction(word) for word in _words(text))
    except ZeroDivisionError as error:
        raise argparse.ArgumentTypeError(f"{text!r} divides by zero") from error


def _metric(text: str) -> tuple[str, str]:
    task, equals, name = text.partition("=")
    if not (task and equals and name):
        raise ValueError(f"--metric takes TASK=NAME, got {text!r}.")
    return task, name
