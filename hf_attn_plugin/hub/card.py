"""Model cards: what was done to a model, what was measured, and how to use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_attn_plugin.config import METHOD_CONFIGS


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measured number.

    Attributes:
        task: The lm-eval task, for example "niah".
        metric: The metric, for example "exact_match".
        value: Its value.
        attn: The attention it was measured under, for example "sparq (rank 16, top_k 64)".
        text: What the task was made from, for example "Python standard library".
        kv_share: Bytes of KV cache read in decoding as a share of dense attention's, or None.
    """

    task: str
    metric: str
    value: float
    attn: str
    text: str = ""
    kv_share: float | None = None


@dataclasses.dataclass(frozen=True)
class CardFigure:
    """A figure that lies in the model's folder.

    Attributes:
        path: The file, absolute or relative to the model's folder.
        caption: A sentence under it.
    """

    path: Path | str
    caption: str


@dataclasses.dataclass(frozen=True)
class CardContent:
    """What a model card tells.

    Attributes:
        title: The model's name.
        method: The attention implementation the model is meant to run with.
        command: The command that made the model.
        parameters: That method's parameters.
        base_model: The model it was made from (Hub name or description), None if from scratch.
        summary: A few sentences on what was done, Markdown.
        measurements: Measured results; they become the `model-index`.
        losses: Losses around a conversion, by stage: ``{"before conversion": 2.1, …}``.
        figures: Figures in the model's folder.
        datasets: Hub names of the training data.
        license: A licence identifier of the Hub ("apache-2.0"), None to leave it out.
        language: Language codes.
        tags: Tags besides our own.
        limitations: Plain sentences, one per bullet.
    """

    title: str
    method: str
    command: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    summary: str = ""
    measurements: tuple[Measurement, ...] = ()
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    figures: tuple[CardFigure, ...] = ()
    datasets: tuple[str, ...] = ()
    license: str | None = None
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    limitations: tuple[str, ...] = ()


def write_model_card(folder: Path | str, content: CardContent) -> Path:
    """Write the model card of a saved model, ``README.md`` in its folder.

    Args:
        folder: A model folder, as `save_pretrained` writes it.
        content: What the card tells.

    Returns:
        The card's path. `huggingface_hub.ModelCard.load` reads it back.

    Raises:
        ValueError: A figure lies outside the folder or does not exist.
        OSError: The folder does not exist or cannot be written.
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: save the model there first.")
    sections = [
        f"# {content.title}",
        content.summary.strip(),
        _usage(content),
        _results(content),
        _losses(content),
        *(_figure(folder, figure) for figure in content.figures),
        _limitations(content),
        f"## How it was made\n\n```bash\n{content.command}\n```",
    ]
    body = "\n\n".join(section for section in sections if section)
    path = folder / "README.md"
    ModelCard(f"---\n{_card_data(content)}\n---\n\n{body}\n").save(path)
    return path


def _card_data(content: CardContent) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=measurement.task,
            dataset_name=_dataset_name(measurement),
            metric_type=measurement.metric,
            metric_name=f"{measurement.metric}, {measurement.attn}",
            metric_value=measurement.value,
        )
        for measurement in content.measurements
    ]
    data = ModelCardData(
        model_name=content.title,
        base_model=content.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=content.license,
        language=list(content.language) or None,
        datasets=list(content.datasets) or None,
        tags=list(dict.fromkeys(["hf-attn-plugin", "long-context", content.method, *content.tags])),
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _dataset_name(measurement: Measurement) -> str:
    return f"{measurement.task} ({measurement.text})" if measurement.text else measurement.task


def _usage(content: CardContent) -> str:
    lines = [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "import hf_attn_plugin  # registers the attention implementations",
        "",
        'folder = "."  # this folder, or the name on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(",
        f'    folder, attn_implementation="{content.method}"',
        ")",
        "```",
    ]
    if content.parameters:
        lines += [
            "",
            f"Parameters of `{content.method}`:",
            "",
            "| parameter | value |",
            "|---|---|",
        ]
        lines += [f"| {name} | {value} |" for name, value in content.parameters.items()]
    if content.parameters and content.method in METHOD_CONFIGS:
        lines += ["", "They are kept in `config.json`; nothing has to be passed."]
    return "\n".join(lines)


def _results(content: CardContent) -> str:
    if not content.measurements:
        return ""
    reads = any(measurement.kv_share is not None for measurement in content.measurements)
    header = ["task", "metric", "attention", "value"] + ["KV cache read"] * reads
    rows = []
    for measurement in content.measurements:
        row = [
            _dataset_name(measurement),
            measurement.metric,
            measurement.attn,
            f"{measurement.value:.4f}",
        ]
        if reads:
            share = measurement.kv_share
            row.append("" if share is None else f"{share:.1%} of dense")
        rows.append(row)
    return "## Measured\n\n" + _table(header, rows)


def _losses(content: CardContent) -> str:
    if not content.losses:
        return ""
    rows = [[stage, f"{loss:.4f}"] for stage, loss in content.losses.items()]
    return "## Conversion\n\n" + _table(["stage", "loss"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _figure(folder: Path, figure: CardFigure) -> str:
    path = folder / figure.path
    if not path.is_file():
        raise ValueError(f"the figure {path} does not exist.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"the figure {path} lies outside the model's folder {folder}: save it inside, "
            "so that it is published with the model."
        )
    relative = path.resolve().relative_to(folder.resolve()).as_posix()
    return f"![{figure.caption}]({relative})\n\n*{figure.caption}*"


def _limitations(content: CardContent) -> str:
    if not content.limitations:
        return ""
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in content.limitations)
