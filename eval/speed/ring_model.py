"""``hf-attn bench ring model``: a LoRA step on one long sequence that is spread over GPUs.

The models of `in_model` (random weights, Llama-3.2-1B's shape and Mistral-7B's with its window), in
their own training loop with `hf_attn_plugin.sequence_parallel`. Before a step is timed, loss and
gradients of two layers of the same shape are compared with those of one process in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

import hf_attn_plugin

from .in_model import SHAPES, WINDOW, Shape, build
from .report import ERROR, OK, WRONG, Results, machine
from .ring_attention import digests
from .ring_team import Team
from .ring_traffic import Traffic
from .table import free
from .timing import Clock

ATTENTION = "ring"
TOKENS, QUICK_TOKENS, TINY_TOKENS = 262144, 16384, 512
_CHECKED = WINDOW + 512  # tokens: more than a window, and every rank's share ends inside one
_TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_IGNORED = -100
_CHUNK = 2048  # tokens whose logits are in memory at a time
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LONG_STEP = 10.0  # seconds; one timed step is enough then
_TIMES_ALLOWED = 2.0
_MOST = 0.1  # of the gradients' norm: a larger error would hide anything


@dataclasses.dataclass(frozen=True)
class StepRow:
    """A step of one model.

    Attributes:
        model: The shape's name.
        layers: How many were measured.
        tokens: In the step, of all ranks together.
        ranks: GPUs that share them.
        status: ok, FAILED numerics, or error.
        detail: What is wrong, where the status is not ok; else what is to be known of the numbers.
        stamp: Devices and versions that the numbers hold for.
        seconds: Of a step; the median where there is more than one.
        peak_gib: Most memory allocated on a rank, weights included.
        sent_gib: What the rank that sends most sends in a step.
        loss: Mean over all tokens of all ranks, of the first step.
        error: The gradients' error in two such layers, as a share of their norm.
        single_error: That of one GPU.
        accelerate: What accelerate's context parallelism says to the model.
    """

    model: str
    layers: int
    tokens: int
    ranks: int
    status: str
    detail: str = ""
    stamp: str = ""
    seconds: float | None = None
    peak_gib: float | None = None
    sent_gib: float | None = None
    loss: float | None = None
    error: float | None = None
    single_error: float | None = None
    accelerate: str = ""

    @property
    def key(self) -> str:
        """What the row is kept under."""
        return f"{self.model} {self.layers} {self.tokens} {self.ranks}"


def run_models(
    team: Team,
    clock: Clock,
    results: Results[StepRow],
    *,
    tokens: int | None = None,
    layers: int | None = None,
    quick: bool = False,
    say: Callable[[str], None],
    written: Callable[[], None] = lambda: None,
) -> tuple[list[StepRow], bool]:
    """A row for every model, on the rank that leads.

    Args:
        team: This process among the others.
        clock: Of this process's device.
        results: Kept rows.
        tokens: In the step; None for `TOKENS`.
        layers: Of all models, instead of their own.
        quick: `QUICK_TOKENS` and two layers.
        say: Receives progress, a line at a time.
        written: Called by the rank that leads when a row has been kept.

    Returns:
        The rows, and whether something failed.
    """
    tiny = team.device.type == "cpu"
    usual = TINY_TOKENS if tiny else QUICK_TOKENS if quick else TOKENS
    length = (tokens or usual) // team.size * team.size
    rows = []
    shapes = SHAPES[::-1]  # the quicker first: a run that is stopped keeps it
    for shape in map(small, shapes) if tiny else shapes:
        depth = layers or (2 if quick or tiny else shape.layers)
        row = StepRow(shape.name, depth, length, team.size, OK, stamp=_stamp())
        kept = team.from_leader(results.get(row.key, row.stamp) if team.leads else None)
        if kept is None:
            kept, wrong = team.attempt(functools.partial(_row, team, clock, shape, row))
            if wrong is not None:
                kept = dataclasses.replace(row, status=ERROR, detail=wrong)
            if team.leads:
                results.add(kept)
                written()
        free(team.device)
        say(f"{shape.name}: {kept.status} {kept.detail or f'{kept.seconds:.2f} s'}")
        rows.append(kept)
    return rows, any(row.status != OK for row in rows)


def small(shape: Shape) -> Shape:
    """The same model with hardly any weights, and a window that a few tokens fill."""

    def config(layers: int, tokens: int) -> PreTrainedConfig:
        found = shape.config(layers, tokens)
        for name, value in _TINY.items():
            setattr(found, name, value)
        if getattr(found, "sliding_window", None) is not None:
            found.sliding_window = TINY_TOKENS // 8
        return found

    return Shape(f"{shape.name}, tiny", shape.layers, config)


def _row(team: Team, clock: Clock, shape: Shape, row: StepRow) -> StepRow:
    tiny = team.device.type == "cpu"
    dtype = torch.float32 if tiny else torch.bfloat16
    row = dataclasses.replace(row, accelerate=accelerate_says(shape))
    error, single = gradient_errors(team, shape, TINY_TOKENS if tiny else _CHECKED, dtype)
    row = dataclasses.replace(row, error=error, single_error=single)
    free(team.device)
    if single > _MOST:
        detail = f"one GPU's own error is {single:.2e}: nothing can be said of the ranks'"
        return dataclasses.replace(row, status=WRONG, detail=detail)
    allowed = _TIMES_ALLOWED * single + torch.finfo(dtype).eps
    if not error <= allowed:
        detail = f"gradients: error {error:.2e}, allowed are {allowed:.2e}"
        return dataclasses.replace(row, status=WRONG, detail=detail)
    return _timed(team, clock, shape, row, dtype)


# -- numbers ---------------------------------------------------------------------------------------


def gradient_errors(
    team: Team, shape: Shape, tokens: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Errors of the gradients of two layers, of all ranks and of one, against float64.

    The truth is eager attention in one process.

    Returns:
        The ranks' error and one GPU's: norms of the gradients' errors as shares of the gradients'
        norm, or the share by which the loss is wrong, where that is more. The same on every rank.
    """
    tokens = tokens // team.size * team.size
    ids = _ids(shape, tokens, team.device)

    def result(attention: str, dtype: torch.dtype, team: Team | None) -> tuple[float, Tensor]:
        model = _LoRA(shape, attention, 2, tokens, ids.device, dtype, random=True)
        return model.backward(ids, team), model.gradients()

    together = result(ATTENTION, dtype, team)

    def compared() -> list[float]:
        errors: list[float] = []
        if team.leads:
            alone = result("flash", dtype, None)
            free(team.device)
            true_loss, true_gradients = result("eager", torch.float64, None)
            for loss, gradients in (together, alone):
                wrong = float((gradients - true_gradients).norm() / true_gradients.norm())
                errors.append(max(wrong, abs(loss - true_loss) / true_loss))
        return errors

    errors, failure = team.attempt(compared)
    if failure is not None:
        raise RuntimeError(failure)
    error, single = team.from_leader(errors)
    return error, single


class _LoRA:
    """A model with random weights and LoRA of rank 16 on its attention's projections."""

    def __init__(
        self,
        shape: Shape,
        attention: str,
        layers: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        random: bool = False,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.base: Any = build(shape, attention, layers, tokens, device)
        if dtype != torch.bfloat16:  # it is, and frequencies of RoPE are to stay in float32
            self.base = self.base.to(dtype)
        options = {"use_reentrant": False}
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        lora = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=_TARGETS,
            task_type="CAUSAL_LM",
            init_lora_weights=not random,  # at first, half of the gradients are 0
        )
        torch.manual_seed(1)
        self.model: Any = get_peft_model(self.base, lora).train()
        if random:
            self._fill()

    def _fill(self) -> None:
        """The same values in every dtype."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.trained():
                values = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(values.bfloat16())

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that get gradients."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def backward(self, ids: Tensor, team: Team | None) -> float:
        """Leave in the parameters the gradients of all tokens.

        Args:
            ids: int64 ``[1, tokens]``, the whole sequence.
            team: The ranks that share it; None where this process does it alone.

        Returns:
            The mean loss over all tokens.
        """
        if team is None:
            hidden = self.base.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = token_losses(hidden[:, :-1], self.base.lm_head.weight, ids[:, 1:]).mean()
            loss.backward()
            return float(loss.detach())
        batch = {"input_ids": ids, "labels": ids}
        with hf_attn_plugin.sequence_parallel(None, self.model, batch) as shard:
            local = {name: shard.batch[name] for name in ("input_ids", "position_ids")}
            labels = shard.batch["shift_labels"]
            hidden = self.base.model(**local, use_cache=False).last_hidden_state
            losses = token_losses(hidden, self.base.lm_head.weight, labels)
            loss = shard.mean(losses, labels != _IGNORED)
            loss.backward()
            shard.average_gradients(self.model)
        return float(loss.detach())

    def gradients(self) -> Tensor:
        """All gradients in one float64 vector."""
        gradients: list[Any] = [parameter.grad for parameter in self.trained()]
        return torch.cat([gradient.double().flatten() for gradient in gradients])


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = _CHUNK) -> Tensor:
    """Cross-entropy of every token without the logits of all at once, backward neither.

    Args:
        hidden: ``[batch, tokens, hidden]``.
        weight: Of the output layer, ``[vocabulary, hidden]``.
        labels: int64 ``[batch, tokens]``; the loss is 0 where it is -100.
        chunk: Tokens whose logits are made together.

    Returns:
        float32 (of float64 inputs float64) ``[batch, tokens]``.
    """

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view_as(labels)

    pieces = zip(hidden.split(chunk, 1), labels.split(chunk, 1), strict=True)
    losses = [checkpoint(part, states, ids, use_reentrant=False) for states, ids in pieces]
    return torch.cat(losses, 1)


# -- time ------------------------------------------------------------------------------------------


def _timed(team: Team, clock: Clock, shape: Shape, row: StepRow, dtype: torch.dtype) -> StepRow:
    held = clock.reset_peak()
    trained = _LoRA(shape, ATTENTION, row.layers, row.tokens, team.device, dtype)
    optimizer = torch.optim.AdamW(trained.trained(), lr=1e-4)

    def step(ids: Tensor) -> tuple[float, float, int]:
        team.align()
        start = clock.mark()
        with Traffic(team.size) as traffic:
            loss = trained.backward(ids, team)
            optimizer.step()
            optimizer.zero_grad()
        seconds = clock.elapsed_ms(start, clock.mark()) / 1e3
        return team.largest([seconds])[0], loss, traffic.sent

    whole = _ids(shape, row.tokens, team.device)
    warm = row.tokens // 16 // team.size * team.size
    step(whole[:, :warm])  # kernels are compiled and loaded here
    steps = [step(whole)]
    while len(steps) < 3 and steps[-1][0] < _LONG_STEP:
        steps.append(step(whole))
    peak, sent = team.largest([clock.peak_bytes() - held, steps[-1][2]])
    return dataclasses.replace(
        row,
        seconds=statistics.median(seconds for seconds, _, _ in steps),
        peak_gib=peak / 2**30,
        sent_gib=sent / 2**30,
        loss=steps[0][1],
    )


def accelerate_says(shape: Shape) -> str:
    """Whether accelerate's context parallelism takes such a model: its own check, asked."""
    try:
        from accelerate.big_modeling import _attach_context_parallel_hooks
    except ImportError:
        return "not asked: its check is not where it was, or accelerate is not installed"
    model: Any = build(shape, "sdpa", 1, 64, torch.device("meta"))
    try:
        _attach_context_parallel_hooks(model)
    except ValueError as error:
        return f"refuses: {str(error).split('. ')[0]}"
    return "takes it"


def _ids(shape: Shape, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(3)  # the same on every rank
    vocabulary: int = shape.config(1, tokens).vocab_size
    return torch.randint(vocabulary, (1, tokens), generator=generator).to(device)


def _stamp() -> str:
    about = machine()
    versions = f"torch {about['torch']}, {about['transformers']}"
    return f"{about['device']}, {versions}, {digests()}"


def step_table(rows: Sequence[StepRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "model",
        "GPUs",
        "s per step",
        "tokens/s",
        "peak GiB a GPU",
        "sent GiB a GPU",
        "first loss",
        "gradients' error",
        "one GPU's",
    ]
    cells = []
    for row in rows:
        name = f"{row.model}, {row.layers} layers, {row.tokens} tokens"
        if row.seconds is None:
            cells.append([name, str(row.ranks), row.status, *["-"] * (len(header) - 3)])
            continue
        cells.append(
            [
                name,
                str(row.ranks),
                f"{row.seconds:.2f}",
                f"{row.tokens / row.seconds:,.0f}",
                f"{row.peak_gib:.1f}",
                f"{row.sent_gib:.2f}",
                f"{row.loss:.3f}",
                *(
                    "-" if error is None else f"{error:.2e}"
                    for error in (row.error, row.single_error)
                ),
            ]
        )
    return header, cells


def step_notes(rows: Sequence[StepRow]) -> list[str]:
    """What the steps are, what accelerate says to the models, and what has no numbers."""
    if not rows:
        return []
    notes = [_MEANING]
    for row in rows:
        if row.accelerate:
            notes.append(f"{row.model}: accelerate's context parallelism {row.accelerate}")
        if row.detail:
            notes.append(f"{row.model}: {row.status}: {row.detail}")
    return notes


_MEANING = (
    "Random weights, bfloat16, batch 1, LoRA of rank 16 on q, k, v and o, gradient checkpointing "
    "(not reentrant), AdamW, the loss in chunks of tokens, in an own loop with "
    f"`hf_attn_plugin.sequence_parallel` and `{ATTENTION}`; a step on a sixteenth of the tokens "
    "before. “error”: of the gradients of two such layers (or of the loss, "
    f"where that is more) on {_CHECKED} tokens, as a share of their norm, against one process with "
    f"eager attention in float64; more than {_TIMES_ALLOWED:.0f} times one GPU's is refused."
)
