"""Decoding over a long cache: our split-key kernel beside PyTorch's and FlashAttention-4.

    hf-attn bench decode dense    or    python -m eval.speed.decoding --out DIR

Times are of the device; "host" is what one call takes the host, which a CUDA graph saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.patterns import Pattern

from .numerics import share_of_budget
from .report import machine_line, markdown_table, text_table
from .timing import CudaClock, copy_bytes_per_second, time_limit, time_stages

HEADS, HEAD_DIM = 32, 128
# KV heads per batch row that are compared with the float64 reference.
_CHECKED_HEADS = 2
_HOST_SECONDS = 0.02

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


class CleanClock(CudaClock):
    """Caches that hold nothing to write back, which would take as long as a short step."""

    def flush(self) -> None:
        """Overwrite a buffer many times as large as the L2 cache, and read it."""
        super().flush()
        self.buffer.view(torch.int64).amax()


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One decoding step of 32 query heads of 128, causal, bfloat16.

    Attributes:
        batch: Batch size.
        length: Keys in the cache.
        kv_heads: Key/value heads.
        queries: New tokens.
        window: Keys that a query sees, or None for all.
        num_sink_tokens: First tokens that every query sees besides.
        filled: Keys that are written, where the cache is longer and only the device knows.
        quick: Whether it belongs to the quick run.
    """

    batch: int
    length: int
    kv_heads: int
    queries: int = 1
    window: int | None = None
    num_sink_tokens: int = 0
    filled: int | None = None
    quick: bool = False

    @property
    def title(self) -> str:
        """In a few words."""
        parts = [f"B={self.batch}, S={self.length}, {self.kv_heads} KV heads"]
        if self.queries > 1:
            parts.append(f"{self.queries} queries")
        if self.window is not None:
            parts.append(f"window {self.window} + {self.num_sink_tokens} first")
        if self.filled is not None:
            parts.append(f"static, {self.filled} filled")
        return ", ".join(parts)

    @property
    def seen(self) -> int:
        """Keys that are seen by any query."""
        if self.window is None:
            return self.filled or self.length
        return self.window + self.queries - 1 + self.num_sink_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are seen."""
        return self.batch * self.kv_heads * self.seen * HEAD_DIM * 2 * 2

    def pattern(self, device: torch.device) -> Pattern:
        """The pairs."""
        offset = None
        if self.filled is not None:
            offset = torch.tensor(self.filled - self.queries, device=device)
        return Pattern(
            q_len=self.queries,
            kv_len=self.length,
            window=self.window,
            num_sink_tokens=self.num_sink_tokens,
            q_offset=offset,
        )

    @property
    def plain(self) -> bool:
        """Whether every query sees every key, which is all that SDPA's kernels do."""
        return self.queries == 1 and self.window is None and self.filled is None


CASES = (
    DecodeCase(1, 131072, 32, quick=True),
    DecodeCase(8, 4096, 32),
    DecodeCase(8, 32768, 32),
    DecodeCase(32, 16384, 32),
    DecodeCase(1, 131072, 8, quick=True),
    DecodeCase(8, 32768, 8, quick=True),
    DecodeCase(32, 16384, 8),
    DecodeCase(1, 131072, 8, queries=4),
    DecodeCase(1, 131072, 8, window=4096, num_sink_tokens=4, quick=True),
    DecodeCase(8, 32768, 8, window=4096, num_sink_tokens=4),
    DecodeCase(1, 131072, 8, filled=16384),
)


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One contender on one case.

    Attributes:
        case: The case's title.
        contender: Its name.
        status: "ok", or why there are no numbers.
        ms: Median milliseconds on the device.
        host_us: Microseconds that a call takes the host.
        bytes_per_second: Of the keys and values that are seen.
        error: The worst error as a share of what is allowed.
    """

    case: str
    contender: str
    status: str
    ms: float | None = None
    host_us: float | None = None
    bytes_per_second: float | None = None
    error: float | None = None


def contenders(case: DecodeCase, device: torch.device) -> dict[str, Decode | str]:
    """The calls by name, or why there is none."""
    calls: dict[str, Decode | str] = {}
    for name, backend in (
        ("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        calls[name] = _sdpa(backend) if case.plain else "one query over every key only"
    calls["sdpa-mask"] = "no mask is needed" if case.plain else _sdpa_with_mask(case, device)
    calls["fa4"] = _flash_attention_4(case)
    calls["triton"] = _triton(case, device)
    return calls


def _sdpa(backend: SDPBackend) -> Decode:
    def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return decode


def _sdpa_with_mask(case: DecodeCase, device: torch.device) -> Decode:
    """What PyTorch does with any other pattern, by whichever of its kernels it prefers."""
    mask = case.pattern(device).visible(device)

    def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    return decode


def _flash_attention_4(case: DecodeCase) -> Decode | str:
    if case.num_sink_tokens or case.filled is not None:
        return "no first tokens" if case.num_sink_tokens else "no offset on the device"
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return "missing: pip install flash-attn-4"

    def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output, *_ = flash_attn_func(*tensors, causal=True)
        return output.transpose(1, 2)

    return decode


def _triton(case: DecodeCase, device: torch.device) -> Decode:
    from hf_attn_plugin.ops.triton.decode import triton_decode

    pattern = case.pattern(device)

    def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return triton_decode(query, key, value, pattern, scaling=HEAD_DIM**-0.5)[0]

    return decode


def check(case: DecodeCase, inputs: tuple[Tensor, ...], output: Tensor) -> float:
    """The worst error over some heads of the first and last batch row, as a share of its budget."""
    query, key, value = inputs
    groups = HEADS // case.kv_heads
    pattern = case.pattern(query.device)
    worst = 0.0
    for row in {0, case.batch - 1}:
        for head in {*range(0, case.kv_heads, max(1, case.kv_heads // _CHECKED_HEADS))}:
            own = slice(head * groups, (head + 1) * groups)
            q, k, v = (
                query[row, None, own],
                key[row, None, head, None],
                value[row, None, head, None],
            )
            want, _ = reference_attention(q.double(), k.double(), v.double(), pattern)
            plain, _ = reference_attention(q, k, v, pattern)
            worst = max(worst, share_of_budget(output[row, None, own], want, plain))
    return worst


def host_microseconds(call: Callable[[], object], repeats: int = 50) -> float:
    """What a call takes the host when the device is not waited for; the best of three.

    Slow calls are repeated less.
    """
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start, spent, calls = time.perf_counter(), 0.0, 0
        while calls < repeats and spent < _HOST_SECONDS:
            call()
            calls, spent = calls + 1, time.perf_counter() - start
        best = min(best, spent / calls)
    torch.cuda.synchronize()
    return best * 1e6


def measure(
    case: DecodeCase, clock: CudaClock, only: frozenset[str] | None = None
) -> list[DecodeRow]:
    """Every contender on one case, each after its numerics.

    Args:
        case: The case.
        clock: The device's.
        only: Names of contenders; None for all.
    """
    torch.manual_seed(case.length)
    shapes = (
        (case.batch, HEADS, case.queries, HEAD_DIM),
        *[(case.batch, case.kv_heads, case.length, HEAD_DIM)] * 2,
    )
    query, key, value = (
        torch.randn(shape, device=clock.device, dtype=torch.bfloat16) for shape in shapes
    )
    rows = []
    for name, decode in contenders(case, clock.device).items():
        if only is not None and name not in only:
            continue
        if isinstance(decode, str):
            rows.append(DecodeRow(case.title, name, decode))
            continue
        try:
            with time_limit(120, f"{name} on {case.title}"):
                decode(query, key, value)  # later calls of one pattern take a shorter way
                error = check(case, (query, key, value), decode(query, key, value))
            if not error <= 1:
                rows.append(DecodeRow(case.title, name, "FAILED numerics", error=error))
                continue

            # bound as defaults: both are called in this iteration, but linters cannot know
            def call(_: object = None, decode: Decode = decode) -> Tensor:
                return decode(query, key, value)

            ms = time_stages(clock, [call]).total_ms
            rate = case.nbytes / ms * 1e3
            host = host_microseconds(call)
            rows.append(DecodeRow(case.title, name, "ok", ms, host, rate, error))
        except Exception as failure:  # whatever a peer does must not stop the others
            first = (str(failure).strip().splitlines() or [""])[0][:160]
            rows.append(DecodeRow(case.title, name, f"error: {type(failure).__name__}: {first}"))
    return rows


def table(rows: list[DecodeRow], copy_rate: float) -> tuple[list[str], list[list[str]]]:
    """Header and cells; ratios are of the peer's time to the row's."""
    peers = ("sdpa-flash", "sdpa-cudnn", "sdpa-mask", "fa4")
    header = ["case", "", "ms", "TB/s", "of copy", "host us", "error/allowed"]
    header += [f"vs {peer}" for peer in peers]
    times = {(row.case, row.contender): row.ms for row in rows}
    cells = []
    for row in rows:
        if row.ms is None or row.bytes_per_second is None:
            continue
        ratios = [times.get((row.case, peer)) for peer in peers]
        cells.append(
            [
                row.case,
                row.contender,
                f"{row.ms:.3f}",
                f"{row.bytes_per_second / 1e12:.2f}",
                f"{row.bytes_per_second / copy_rate:.0%}",
                f"{row.host_us:.0f}",
                f"{row.error:.2f}",
                *["-" if peer is None else f"{peer / row.ms:.2f}x" for peer in ratios],
            ]
        )
    return header, cells


def _said(rows: list[DecodeRow]) -> list[str]:
    """Why there are no numbers, a line per contender and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault((row.contender, row.status), []).append(row.case)
    return [f"{name}: {reason} ({'; '.join(cases)})" for (name, reason), cases in reasons.items()]


def run(out: Path, *, command: str, quick: bool = False, only: frozenset[str] | None = None) -> int:
    """Measure, print a table, write ``decoding.md`` and ``decoding.json`` into ``out``.

    Args:
        out: The folder.
        command: The command line, for the page's first line.
        quick: The main cases only.
        only: Names of contenders; None for all.

    Returns:
        The exit status: 1 where numerics failed or our kernel could not run.
    """
    if not torch.cuda.is_available():
        print("hf-attn bench decode needs a GPU: there is none here.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    clock = CleanClock(device)
    copy_rate = copy_bytes_per_second(clock, device)
    rows: list[DecodeRow] = []
    for case in CASES:
        if case.quick or not quick:
            rows += measure(case, clock, only)
            torch.cuda.empty_cache()
    header, cells = table(rows, copy_rate)
    said = _said(rows)
    about = f"{machine_line()}; a copy moves {copy_rate / 1e12:.2f} TB/s"
    print(about, text_table(header, cells), "\n".join(said), sep="\n\n")
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"<!-- Made by: {command} -->", "# Speed of decoding", about, _MEANING]
    parts += [markdown_table(header, cells), "\n".join(f"- {line}" for line in said)]
    (out / "decoding.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    content = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    (out / "decoding.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    wrong = [
        row
        for row in rows
        if row.status.startswith("FAILED")
        or (row.contender == "triton" and row.status.startswith("error"))
    ]
    return 1 if wrong else 0


_MEANING = (
    "32 query heads of 128, bfloat16, causal, random inputs; medians of CUDA events with the L2 "
    "cache cleared. TB/s are of the keys and values that the queries see; “of copy” is that as a "
    "share of what a large copy reads and writes in the same process. “host us” is what a call "
    "takes the host outside of a CUDA graph. “error/allowed”: the worst error against float64, as "
    "a share of twice plain PyTorch's plus a rounding floor. “vs” is the peer's time divided by "
    "the row's: above 1 is faster than the peer."
)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("eval/results/speed"))
    parser.add_argument("--quick", action="store_true", help="the main cases only")
    parser.add_argument("--only", help="names of contenders, separated by commas")
    args = parser.parse_args()
    only = None if args.only is None else frozenset(args.only.split(","))
    command = f"python -m eval.speed.decoding {shlex.join(sys.argv[1:])}".strip()
    return run(args.out, command=command, quick=args.quick, only=only)


if __name__ == "__main__":
    sys.exit(main())
