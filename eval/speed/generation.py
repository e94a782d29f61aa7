"""``model.generate()`` on a Llama-8B-shaped model under several attentions and caches.

    hf-attn bench decode generation

Random weights, bfloat16. The cache of every contender is filled with random keys and values in the
place of a prefill (which is timed apart), then `generate` goes on from it, with the same tokens for
all. Logits are compared apart, over a cache in which some keys stand out: among random ones, which
of many equally good keys SparQ chooses hangs on rounding, layer after layer.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)

from hf_attn_plugin import SparQConfig, configure

from .report import ERROR, MISSING, OK, WRONG, Results, markdown_table, text_table
from .sparq_decoding import stamp
from .table import free
from .timing import Clock, CudaClock, time_limit

PAGE, RESULTS = "generation.md", "generation.json"
LAYERS = 32
LENGTHS, BATCHES = (32768, 131072), (1, 8)
QUICK_LENGTHS, QUICK_LAYERS = (32768,), 4
WARM, TIMED = 8, 32
"""Steps before the clock runs, in which compiled contenders compile and are captured; and after."""
CHECKED = 4
"""Steps after which logits are compared."""
STAND_OUT = 64
"""Keys that stand out then; all others are 0."""

_SPARE_BYTES = 4 * 2**30  # activations, and what the clock's and others' kernels take
_HEADROOM = 1.25  # SparQ's dynamic cache grows by a quarter
_TIMEOUT = 400.0
# Of the last step's logits, beside the first contender that computes the same: in bfloat16 and
# with random weights kernels differ by a percent or two; what has nothing to do with it, by 1.4.
_ALLOWED = {"dense": 0.1, "sparq": 0.2}


@dataclasses.dataclass(frozen=True)
class Contender:
    """An attention with a kind of cache.

    Attributes:
        attention: The ``attn_implementation``.
        static: Whether the cache is static, which `generate` compiles steps for.
    """

    attention: str
    static: bool = False

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"{self.attention}, {'static cache, compiled' if self.static else 'dynamic cache'}"

    @property
    def kind(self) -> str:
        """Contenders of one kind compute the same."""
        return "sparq" if self.attention == "sparq" else "dense"


CONTENDERS = (
    Contender("sdpa"),
    Contender("sdpa", static=True),
    Contender("flash_attention_2"),
    Contender("flash"),
    Contender("sparq"),
    Contender("sparq", static=True),
)
STOCK, COMPILED = CONTENDERS[0].name, CONTENDERS[1].name


@dataclasses.dataclass(frozen=True)
class GenerationRow:
    """One contender on one prompt.

    Attributes:
        layers: Of the model.
        batch: Sequences.
        tokens: Of each prompt.
        contender: Its name.
        status: ok, FAILED numerics, missing or error.
        detail: What is wrong, where the status is not ok; else what to know of the numbers.
        stamp: Device and versions that the numbers hold for.
        step_ms: Median milliseconds from a token to the next.
        peak_gib: Most memory allocated while decoding; weights and cache are in it.
        prefill_s: Seconds of the prompt's forward pass, None where it was not measured.
        warm_s: Seconds of the first steps, compilation included.
        logits_error: ‖difference‖ / ‖logits‖ from the first contender of its kind, after `CHECKED`
            steps over a cache in which `STAND_OUT` keys stand out.
    """

    layers: int
    batch: int
    tokens: int
    contender: str
    status: str
    detail: str = ""
    stamp: str = ""
    step_ms: float | None = None
    peak_gib: float | None = None
    prefill_s: float | None = None
    warm_s: float | None = None
    logits_error: float | None = None

    @property
    def key(self) -> str:
        """What the row is kept under."""
        return f"{self.layers} {self.batch} {self.tokens} {self.contender}"

    @property
    def tokens_per_second(self) -> float | None:
        """Of all sequences together."""
        return None if self.step_ms is None else self.batch / self.step_ms * 1e3


def llama_8b(layers: int, tokens: int) -> LlamaConfig:
    """The shape of Llama-3.1-8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


class SameTokens(LogitsProcessor):
    """Chooses the next tokens whatever the logits; notes when each step's logits are there.

    Args:
        clock: The device's.
        vocabulary: Number of tokens.
    """

    def __init__(self, clock: Clock, vocabulary: int) -> None:
        self.clock, self.vocabulary = clock, vocabulary
        self.marks: list[Any] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Let only one token through."""
        self.marks.append(self.clock.mark())
        self.last = scores
        chosen = 7 + 31 * len(self.marks) % (self.vocabulary - 7)
        only = torch.full_like(scores, -torch.inf)
        only[:, chosen] = 0
        return only


class GenerationBench:
    """One model, measured under all contenders.

    Args:
        layers: Of the model.
        clock: Of the device.
        device: Where.
        results: Keeps the rows.
        say: Receives progress, a line at a time.
        prefill: Whether to time the prompt's forward pass.
        config: Makes the config from layers and tokens.
    """

    def __init__(
        self,
        layers: int,
        clock: Clock,
        device: torch.device,
        results: Results[GenerationRow],
        say: Callable[[str], None],
        prefill: bool = True,
        config: Callable[[int, int], LlamaConfig] = llama_8b,
    ) -> None:
        self.layers, self.clock, self.device, self.results = layers, clock, device, results
        self.say, self.prefill, self.config = say, prefill, config
        self.stamp = stamp()
        self.model: Any = None

    def measure(
        self, batch: int, tokens: int, contenders: Sequence[Contender] = CONTENDERS
    ) -> list[GenerationRow]:
        """Every contender on one prompt."""
        logits: dict[str, Tensor] = {}
        rows = []
        for contender in contenders:
            row = GenerationRow(self.layers, batch, tokens, contender.name, OK, "", self.stamp)
            done = self.results.get(row.key, row.stamp)
            if done is None or (self.prefill and done.prefill_s is None and not contender.static):
                try:
                    with time_limit(_TIMEOUT, contender.name):
                        done = self._row(row, contender, logits)
                except torch.OutOfMemoryError:
                    done = dataclasses.replace(row, status=ERROR, detail="does not fit")
                except ImportError as error:
                    done = dataclasses.replace(row, status=MISSING, detail=_first_line(error))
                except Exception as error:  # a contender must not stop the others
                    text = f"{type(error).__name__}: {_first_line(error)}"
                    done = dataclasses.replace(row, status=ERROR, detail=text)
                torch._dynamo.reset()
                free(self.device)
                self.results.add(done)
            number = done.detail if done.step_ms is None else f"{done.step_ms:.2f} ms per step"
            self.say(f"B={batch}, {tokens} tokens: {contender.name}: {done.status} {number}")
            rows.append(done)
        return rows

    def _row(
        self, row: GenerationRow, contender: Contender, logits: dict[str, Tensor]
    ) -> GenerationRow:
        missing = _lacks(contender.attention)
        if missing is not None:
            return dataclasses.replace(row, status=MISSING, detail=missing)
        room = self._room(row, contender)
        if room is not None:
            return dataclasses.replace(row, status=ERROR, detail=room)
        model = self._load(contender.attention)
        prefill = None
        if self.prefill and not contender.static:
            prefill = self._prefill(model, row.batch, row.tokens)
        cache = self._filled_cache(model, contender, row.batch, row.tokens)
        self.clock.reset_peak()
        start = self.clock.mark()
        marks = self._generate(model, cache, row, WARM + TIMED).marks
        steps = [
            self.clock.elapsed_ms(first, second)
            for first, second in zip(marks[WARM:-1], marks[WARM + 1 :], strict=True)
        ]
        peak = self.clock.peak_bytes()
        if not contender.static:
            cache = None  # its memory is needed
        cache = self._filled_cache(model, contender, row.batch, row.tokens, cache, stand_out=True)
        last = self._generate(model, cache, row, CHECKED).last
        assert last is not None
        mine = last.float().cpu()
        other = logits.setdefault(contender.kind, mine)
        error = float((mine - other).norm() / other.norm())
        done = dataclasses.replace(
            row,
            step_ms=statistics.median(steps),
            peak_gib=peak / 2**30,
            prefill_s=prefill,
            warm_s=self.clock.elapsed_ms(start, marks[WARM]) / 1e3,
            logits_error=error,
        )
        if not error <= _ALLOWED[contender.kind]:
            text = f"the logits are {error:.2f} of their norm away from the others'"
            return GenerationRow(
                row.layers, row.batch, row.tokens, row.contender, WRONG, text, row.stamp
            )
        return done

    def _generate(self, model: Any, cache: Any, row: GenerationRow, steps: int) -> SameTokens:
        """Tokens after a prompt that the cache holds; what each step left behind."""
        processor = SameTokens(self.clock, model.config.vocab_size)
        ids = self._prompt(row.batch, row.tokens + 1)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=1 + steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )
        return processor

    def _load(self, attention: str) -> Any:
        if self.model is None:
            config: Any = self.config(self.layers, max(LENGTHS) + 1024)
            configure(config, SparQConfig(rank=config.head_dim // 4))
            torch.manual_seed(0)
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with self.device:
                    self.model = LlamaForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(dtype)
        self.model.set_attn_implementation(attention)
        self.model.__dict__.pop("_compiled_call", None)
        return self.model

    def _prompt(self, batch: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(7, self.model.config.vocab_size, (batch, tokens), generator=generator)
        return ids.to(self.device)

    def _prefill(self, model: Any, batch: int, tokens: int) -> float:
        """Seconds of the prompt's forward pass; one sequence at a time, which is all that fits."""
        ids = self._prompt(1, tokens)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :512], past_key_values=DynamicCache(config=model.config))  # loads kernels
            start = self.clock.mark()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return self.clock.elapsed_ms(start, self.clock.mark()) / 1e3 * batch

    def _filled_cache(
        self,
        model: Any,
        contender: Contender,
        batch: int,
        tokens: int,
        cache: Any = None,
        stand_out: bool = False,
    ) -> Any:
        """Random keys and values, the same for every contender and in all layers.

        They go into a new cache, or again into a static one. With ``stand_out`` all keys but
        `STAND_OUT` are 0, so that rounding chooses none.
        """
        config = model.config
        if cache is not None:
            cache.reset()
        elif contender.static:
            cache = StaticCache(config=config, max_cache_len=tokens + 2 + WARM + TIMED)
        else:
            cache = DynamicCache(config=config)
        generator = torch.Generator(self.device).manual_seed(batch + tokens)
        shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        keys, values = (
            torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        if stand_out:
            order = torch.randperm(tokens, generator=generator, device=self.device)
            keys.mul_(2).index_fill_(2, order[STAND_OUT:], 0)
        with torch.no_grad():
            for layer in range(config.num_hidden_layers):
                cache.update(keys, values, layer)  # copies them
        return cache

    def _room(self, row: GenerationRow, contender: Contender) -> str | None:
        """Why it cannot fit, by arithmetic; None if it may."""
        if self.device.type != "cuda":
            return None
        total = torch.cuda.get_device_properties(self.device).total_memory
        config: Any = self.config(row.layers, row.tokens)
        hidden, inner = config.hidden_size, config.intermediate_size
        width = config.num_key_value_heads * config.head_dim
        layer = hidden * (2 * hidden + 2 * width + 3 * inner)
        weights = 2 * (row.layers * layer + 2 * config.vocab_size * hidden)
        cache = row.batch * row.tokens * width * 2 * 2 * row.layers
        if contender.attention == "sparq":
            cache = int(cache * 1.5 * (1 if contender.static else _HEADROOM))
        needed = weights + cache + _SPARE_BYTES
        if needed <= total:
            return None
        return f"does not fit: {needed / 2**30:.0f} GiB of {total / 2**30:.0f} GiB"


def run(
    out: Path,
    *,
    command: str,
    layers: int | None = None,
    quick: bool = False,
    fresh: bool = False,
    prefill: bool = True,
    say: Callable[[str], None],
    device: torch.device | None = None,
    clock: Clock | None = None,
) -> int:
    """Measure all prompts, print a table and write `PAGE` and `RESULTS` into ``out``.

    Args:
        out: The folder.
        command: The command line, for the page's first line.
        layers: Of the model, instead of its 32.
        quick: Few layers, short prompts, no prefill.
        fresh: Measure again what is kept in ``out``.
        prefill: Whether to time the prompts' forward passes.
        say: Receives progress, a line at a time.
        device: Where; None is the GPU.
        clock: Of the device; None is that of the GPU.

    Returns:
        The exit status: 1 where numerics failed or ours could not run.
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    clock = clock or CudaClock(device, flush_bytes=0)
    results = Results(out / RESULTS, GenerationRow, fresh)
    depth = layers or (QUICK_LAYERS if quick else LAYERS)
    bench = GenerationBench(depth, clock, device, results, say, prefill=prefill and not quick)
    rows = []
    for tokens in QUICK_LENGTHS if quick else LENGTHS:
        for batch in BATCHES:
            rows += bench.measure(batch, tokens)
            write_page(out / PAGE, rows, command)  # a run that is stopped leaves one, too
    print("\n".join([text_table(*table(rows)), *notes(rows)]))
    wrong = [row for row in rows if row.status == WRONG]
    ours = ("sparq", "flash,")
    wrong += [
        row
        for row in rows
        if row.status == ERROR
        and row.contender.startswith(ours)
        and not row.detail.startswith("does not fit")
    ]
    return 1 if wrong else 0


def write_page(path: Path, rows: Sequence[GenerationRow], command: str) -> None:
    """The page of all rows."""
    parts = [f"<!-- Made by: {command} -->", "# Generation under several attentions and caches"]
    stamps = "; ".join(dict.fromkeys(row.stamp for row in rows))
    parts += [stamps, _MEANING, markdown_table(*table(rows))]
    parts.append("\n".join(f"- {line}" for line in notes(rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def table(rows: Sequence[GenerationRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; ratios are of tokens per second to `STOCK`'s and `COMPILED`'s."""
    header = ["prompts", "attention, cache", "tokens/s", "ms per step", "vs stock", "vs compiled"]
    prefilled = any(row.prefill_s is not None for row in rows)
    header += ["peak GiB", *(["prefill s"] if prefilled else []), "first steps s", "logits apart"]
    times = {(row.layers, row.batch, row.tokens, row.contender): row.step_ms for row in rows}
    cells = []
    for row in rows:
        name = f"{row.batch} x {row.tokens}, {row.layers} layers"
        if row.step_ms is None:
            cells.append([name, row.contender, *["-"] * (len(header) - 2)])
            continue
        peers = [times.get((row.layers, row.batch, row.tokens, peer)) for peer in (STOCK, COMPILED)]
        prefill = "-" if row.prefill_s is None else f"{row.prefill_s:.1f}"
        cells.append(
            [
                name,
                row.contender,
                f"{row.tokens_per_second:.1f}",
                f"{row.step_ms:.2f}",
                *["-" if peer is None else f"{peer / row.step_ms:.2f}x" for peer in peers],
                f"{row.peak_gib:.1f}",
                *([prefill] if prefilled else []),
                f"{row.warm_s:.1f}",
                "-" if row.logits_error is None else f"{row.logits_error:.3f}",
            ]
        )
    return header, cells


def notes(rows: Sequence[GenerationRow]) -> list[str]:
    """A line for everything that has no numbers, or whose numbers need a word."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row.step_ms is None or row.detail:
            text = f"{row.contender}: {row.status}: {row.detail}"
            said.setdefault(text, []).append(f"{row.batch} x {row.tokens}")
    return [f"{text} ({', '.join(prompts)})" for text, prompts in said.items()]


def _lacks(attention: str) -> str | None:
    """Why an attention of other people's cannot be had here."""
    if attention != "flash_attention_2":
        return None
    from transformers.utils import is_flash_attn_2_available

    return None if is_flash_attn_2_available() else "flash-attn is not installed"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


_MEANING = (
    "`model.generate()` of a model in the shape of Llama-3.1-8B, random weights, bfloat16, 32 "
    "query heads over 8 of 128; `sparq` with r=32, k=128. Medians of "
    f"{TIMED} steps after {WARM}, in which static caches are compiled and captured. The caches "
    "hold random keys and values in the place of a prompt's; what they hold does not change how "
    "long a step takes (see sparq.md for how far that is so). “prefill” is a forward pass over the "
    "prompts. “peak” includes the weights. While a layer's keys and values take less than "
    "`SparQConfig.dense_below` (one prompt of 32,768 does by default), `sparq` decodes densely. "
    "“logits apart”: how far the logits are from those of the first contender that computes the "
    f"same (dense attention, or SparQ), after {CHECKED} equal tokens over a cache in which all but "
    f"{STAND_OUT} keys are 0; SparQ fills its choice up with some of these, whichever rounding "
    "puts first. Over random keys such a comparison says nothing of SparQ: of many keys with "
    "nearly equal masses other ones are chosen after any rounding, in every layer."
)
