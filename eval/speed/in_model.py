"""``hf-attn bench model``: a LoRA step of whole models under several attentions.

Random weights in the shapes of Llama-3.2-1B and of Mistral-7B (whose window is 4096), bfloat16,
LoRA of rank 16 on the attention's projections, gradient checkpointing, AdamW. The loss is computed
in chunks of tokens for everyone: the float32 logits of 65,536 tokens alone would take 31 GiB.
Before a step is timed, `hf_attn_plugin.verify` compares outputs and gradients of two layers of the
same shape with eager attention in float64.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_attn_plugin
from hf_attn_plugin import SlidingWindowConfig, configure

from .contenders import kernel_versions, source_hash
from .report import ERROR, OK, WRONG, Results, machine, markdown_table, text_table
from .table import free
from .timing import Clock, CudaClock, time_limit

PAGE, RESULTS = "model.md", "model.json"
ATTENTIONS = ("sdpa", "flex_attention", "flash", "sliding_window")
TOKENS, QUICK_TOKENS = 65536, 8192
WINDOW = 4096
_OURS = ("flash", "sliding_window")
_CHUNK = 2048  # tokens whose logits are in memory at a time
_STEPS = 2
_LONG_STEP = 15.0  # seconds; one timed step is enough then


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        name: What it is called in tables.
        layers: Of the real model.
        config: Makes the config from layers and tokens.
    """

    name: str
    layers: int
    config: Callable[[int, int], PreTrainedConfig]


def _llama(layers: int, tokens: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )


def _mistral(layers: int, tokens: int) -> PreTrainedConfig:
    return MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=tokens,
        sliding_window=WINDOW,
    )


SHAPES = (
    Shape("Llama 1B", 16, _llama),
    Shape(f"Mistral 7B, window {WINDOW}", 32, _mistral),
)


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One attention in one model.

    Attributes:
        model: The shape's name.
        layers: How many were measured.
        tokens: In the step.
        attention: The ``attn_implementation``.
        status: ok, FAILED numerics, or error.
        detail: What is wrong, where the status is not ok.
        stamp: Device and versions that the numbers hold for.
        seconds: Median of the timed steps.
        peak_gib: Most memory allocated, weights included.
        loss: Of the first step, the same for everyone who computes the same attention.
    """

    model: str
    layers: int
    tokens: int
    attention: str
    status: str
    detail: str = ""
    stamp: str = ""
    seconds: float | None = None
    peak_gib: float | None = None
    loss: float | None = None

    @property
    def key(self) -> str:
        """What the row is kept under."""
        return f"{self.model} {self.layers} {self.tokens} {self.attention}"


def run(
    out: Path,
    *,
    command: str,
    layers: int | None = None,
    tokens: int | None = None,
    attentions: Sequence[str] | None = None,
    quick: bool = False,
    fresh: bool = False,
    peer_timeout: float = 240.0,
    say: Callable[[str], None],
    device: torch.device | None = None,
    clock: Clock | None = None,
) -> int:
    """Measure a step of every shape under every attention, print a table and write it.

    Args:
        out: Folder for `PAGE` and `RESULTS`.
        command: The command line, for the page's first line.
        layers: Of both models, instead of their own.
        tokens: In the step.
        attentions: Instead of `ATTENTIONS`; ours are measured in any case.
        quick: `QUICK_TOKENS` and two layers.
        fresh: Measure again what is kept in ``out``.
        peer_timeout: Seconds that one attention in one model may take, compilation included.
        say: Receives progress, a line at a time.
        device: Where; None is the GPU.
        clock: Of the device; None is that of the GPU.

    Returns:
        The exit status: 1 where numerics failed, or ours could not run.
    """
    wanted = ATTENTIONS if attentions is None else tuple(dict.fromkeys((*attentions, *_OURS)))
    length = tokens or (QUICK_TOKENS if quick else TOKENS)
    device = device or torch.device("cuda")
    clock = clock or CudaClock(device, flush_bytes=0)
    results = Results(out / RESULTS, StepRow, fresh)
    rows = []
    for shape in SHAPES:
        depth = layers or (2 if quick else shape.layers)
        for attention in wanted:
            row = StepRow(shape.name, depth, length, attention, OK, stamp=_stamp())
            kept = results.get(row.key, row.stamp)
            if kept is None:
                kept = _measured(shape, row, peer_timeout, device, clock)
                results.add(kept)
            say(
                f"{shape.name}: {attention}: {kept.status} {kept.detail or f'{kept.seconds:.2f} s'}"
            )
            rows.append(kept)
            _write_page(out / PAGE, rows, command)  # a run that is stopped leaves one, too
    print("\n".join([text_table(*table(rows)), *notes(rows), str(out / PAGE)]))
    bad = [row for row in rows if row.status == WRONG]
    bad += [row for row in rows if row.status == ERROR and row.attention in _OURS]
    return 1 if bad else 0


def check_peers(names: Sequence[str]) -> None:
    """Raise ValueError where a name is no ``attn_implementation``."""
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no peer named {', '.join(unknown)}: choose from {', '.join(known)}")


def _write_page(path: Path, rows: Sequence[StepRow], command: str) -> None:
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        f"<!-- Made by: {command} -->",
        "# A LoRA step under several attentions",
        f"{about}\n\n{_MEANING}",
        markdown_table(*table(rows)),
        *(f"- {line}" for line in notes(rows)),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _measured(
    shape: Shape, row: StepRow, seconds: float, device: torch.device, clock: Clock
) -> StepRow:
    """The row with its numbers, or with what went wrong."""
    try:
        with time_limit(seconds, f"{row.attention} in {row.model}"):
            wrong = check(shape, row.attention, device)
            if wrong is not None:
                return dataclasses.replace(row, status=WRONG, detail=wrong)
            return step_row(shape, row, device, clock)
    except Exception as error:  # whatever a peer does must not stop the others
        lines = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__}: {lines[0][:200]}"
        return dataclasses.replace(row, status=ERROR, detail=text)
    finally:
        torch._dynamo.reset()
        free(device)


def check(shape: Shape, attention: str, device: torch.device) -> str | None:
    """What `hf_attn_plugin.verify` finds wrong in two such layers; None if nothing."""
    tokens = WINDOW + 256
    model: Any = build(shape, attention, 2, tokens, device)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    report = hf_attn_plugin.verify(model, {"input_ids": ids, "use_cache": False}, gradients=True)
    return None if report.ok else str(report.first_difference)


def build(
    shape: Shape, attention: str, layers: int, tokens: int, device: torch.device
) -> nn.Module:
    """The model with random weights, the same for every attention."""
    config = shape.config(layers, tokens)
    if attention == "sliding_window":
        configure(config, SlidingWindowConfig(window=WINDOW))
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )


def step_row(shape: Shape, row: StepRow, device: torch.device, clock: Clock) -> StepRow:
    """Time the steps of one attention in one model."""
    from peft import LoraConfig, get_peft_model

    free(device)  # the check's model
    held = clock.reset_peak()
    base: Any = build(shape, row.attention, row.layers, row.tokens, device)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(base.config.vocab_size, (1, row.tokens), device=device)

    def step() -> tuple[float, float]:
        start = clock.mark()
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = chunked_loss(hidden[:, :-1], base.lm_head.weight, ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock.elapsed_ms(start, clock.mark()) / 1e3, float(loss.detach())

    warm, loss = step()
    timed = [step()[0] for _ in range(1 if warm > _LONG_STEP else _STEPS)]
    peak = (clock.peak_bytes() - held) / 2**30
    return dataclasses.replace(row, seconds=statistics.median(timed), peak_gib=peak, loss=loss)


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = _CHUNK) -> Tensor:
    """Mean cross-entropy without the logits of all tokens at once, in the backward pass neither.

    Args:
        hidden: ``[batch, tokens, hidden]``.
        weight: Of the output layer, ``[vocabulary, hidden]``.
        labels: int64 ``[batch, tokens]``.
        chunk: Tokens whose logits are made together.
    """

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    pieces = zip(hidden.split(chunk, 1), labels.split(chunk, 1), strict=True)
    losses = [checkpoint(part, states, ids, use_reentrant=False) for states, ids in pieces]
    return torch.stack(losses).sum() / labels.numel()


def table(rows: Sequence[StepRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; ratios are to ``sdpa`` in the same model."""
    header = ["model", "attention", "s per step", "tokens/s", "vs sdpa", "peak GiB", "first loss"]
    base = {row.model: row.seconds for row in rows if row.attention == "sdpa" and row.seconds}
    cells = []
    for row in rows:
        name = f"{row.model}, {row.layers} layers, {row.tokens} tokens"
        if row.seconds is None:
            cells.append([name, row.attention, row.status, "-", "-", "-", "-"])
            continue
        stock = base.get(row.model)
        cells.append(
            [
                name,
                row.attention,
                f"{row.seconds:.2f}",
                f"{row.tokens / row.seconds:,.0f}",
                "-" if stock is None else f"{stock / row.seconds:.2f}x",
                f"{row.peak_gib:.1f}",
                f"{row.loss:.3f}",
            ]
        )
    return header, cells


def notes(rows: Sequence[StepRow]) -> list[str]:
    """A line for everything without numbers."""
    return [
        f"{row.attention} in {row.model}: {row.status}: {row.detail}"
        for row in rows
        if row.seconds is None
    ]


def _stamp() -> str:
    about = machine()
    versions = f"torch {about['torch']}, {about['transformers']}, {kernel_versions()}"
    return f"{about['device']}, {versions}, {source_hash()}"


_MEANING = (
    "Random weights, bfloat16, LoRA of rank 16 on q, k, v and o, gradient checkpointing "
    f"(not reentrant), AdamW, the loss in chunks of {_CHUNK} tokens for all. Llama under "
    f"`sliding_window` has a window of {WINDOW} and so computes fewer pairs than the others; in "
    "Mistral all compute the same. Before timing, `hf_attn_plugin.verify` compared outputs and "
    "gradients of two such layers with eager attention in float64."
)
