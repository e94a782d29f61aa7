"""What the decoding kernel is told: the pairs as a few numbers, the tile, the number of splits.

Nothing here reads a value back from the device. Imports no Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from hf_attn_plugin.ops.triton.support_decode import needs_pairs
from hf_attn_plugin.patterns import Pattern

# Farther than any key: a limit that does not bind. Twice it is still a 32-bit number.
FAR = 2**30 - 1
# Pairs of a pattern that are evaluated at a time.
_CHUNK_PAIRS = 2**22
# A split of fewer keys than this costs more to merge than it saves.
_MIN_SPLIT_KEYS = 128


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel cuts its work.

    Attributes:
        rows: Rows of the query tile: query heads of one KV group times queries.
        keys: Keys that are loaded at a time.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        per_sm: Programs that run on one multiprocessor at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    per_sm: int


def choose_tile(rows: int, head_dim: int, value_dim: int, itemsize: int) -> Tile:
    """The tile for a call.

    Args:
        rows: Query heads of a KV group times queries.
        head_dim: Of queries and keys.
        value_dim: Of values.
        itemsize: Bytes of one element.

    Returns:
        A tile whose loads in flight fit into a Hopper multiprocessor's shared memory, 227 KiB.

    Measured on one H200 in bfloat16 with head_dim 128, 32 heads: 32 to 128 keys, 2 to 8 warps, 2 to
    6 stages and 1 to 4 programs per multiprocessor are within 4 % of each other on long caches (496
    us for 131072 tokens of 32 KV heads, 140 us for 8); under windows of 1024 few keys or few warps
    cost a fifth.
    """
    token_bytes = (_padded(head_dim) + _padded(value_dim)) * itemsize
    # What is loaded at a time: 32 KiB of keys and values. With three stages two such loads are in
    # flight, and two programs fit.
    keys = 128
    while keys > 16 and keys * token_bytes > 32 * 1024:
        keys //= 2
    # More rows would not fit into registers, and are further programs that read the same keys.
    most_rows = max(16, 16 * 1024 // (max(head_dim, value_dim) * itemsize))
    tile_rows = 16
    while tile_rows < min(rows, 64) and tile_rows * 2 <= most_rows:
        tile_rows *= 2
    held = 2 * keys * token_bytes + tile_rows * head_dim * itemsize + 12 * 1024
    per_sm = min(2, max(1, 227 * 1024 // held))
    return Tile(rows=tile_rows, keys=keys, warps=4, stages=3, per_sm=per_sm)


def _padded(dim: int) -> int:
    return 1 << (dim - 1).bit_length() if dim <= 256 else dim


def choose_splits(programs: int, keys: int, sm_count: int, tile: Tile) -> int:
    """Into how many parts the keys are split, so that the programs fill the device.

    Args:
        programs: Programs without splitting: batch times KV heads times query tiles.
        keys: The most keys that a query may see.
        sm_count: The device's multiprocessors.
        tile: The tile.

    Returns:
        At least 1. All programs run at once or nearly so: as many as there is room for in one wave,
        or in a few where a single one would leave more than a twentieth of it empty.
    """
    most = max(1, -(-keys // max(_MIN_SPLIT_KEYS, tile.keys)))
    room = sm_count * tile.per_sm
    best, best_share = 1, 0.0
    for waves in (1, 2, 3, 4):
        splits = max(1, min(waves * room // programs, most))
        used = splits * programs
        share = used / (-(-used // room) * room)
        if share > best_share + 0.02:
            best, best_share = splits, share
        if best_share >= 0.95 or splits == most:
            break
    return best


@dataclasses.dataclass(frozen=True)
class Plan:
    """The pairs in the kernel's terms; keys and queries are counted by key index.

    Attributes:
        numbers: What `pack` packs, in the order of the kernel's arguments.
        sparse: Whether a method's terms (``near`` and what follows it) restrict the pairs.
        steps: Whether ``dilation`` or ``stride`` does.
        keys: The most keys that the queries see; decides the number of splits.
        offset: int ``[batch or 1]``, the first query's position, on the device.
        starts: int ``[batch or 1]``, a key before which none may attend.
        mask: bool ``[batch or 1, heads or 1, queries or 1, kv_len]``, pairs that may attend.
        blocks: int32 ``[batch or 1, key blocks]``, the blocks to visit, where they are listed.
        counts: int32 ``[batch or 1]``, how many of them.
    """

    numbers: tuple[int, ...]
    sparse: bool
    steps: bool
    keys: int
    offset: Tensor | None = None
    starts: Tensor | None = None
    mask: Tensor | None = None
    blocks: Tensor | None = None
    counts: Tensor | None = None


def make_plan(pattern: Pattern, device: torch.device, block: int) -> Plan:
    """The plan for ``pattern``; ``block`` is the tile's number of keys."""
    if needs_pairs(pattern):
        mask, blocks, counts = _pairs(pattern, device, block)
        numbers = (0, FAR, FAR, 0, 0, 0, 1, 0)
        return Plan(numbers, False, False, _most_keys(pattern), None, None, mask, blocks, counts)
    offset = pattern.q_offset
    if isinstance(offset, Tensor):
        first, offset = -pattern.kv_offset, offset.reshape(-1)
    else:
        start = pattern.kv_len - pattern.q_len if offset is None else offset - pattern.kv_offset
        first, offset = start, None
    band = FAR if pattern.band is None else min(pattern.band, FAR)
    first_tokens = max(pattern.num_sink_tokens, pattern.num_global_tokens)
    # With an offset below 0 more keys lie before the first tokens' end; without any, none do.
    prefix = first_tokens - pattern.kv_offset if first_tokens else 0
    leading = pattern.num_global_tokens and pattern.num_global_tokens - pattern.kv_offset
    numbers = (
        first,
        band,  # the first key: query - band < key
        1 if pattern.causal else band,  # the last key: key < query + this
        0 if pattern.reach is None else min(pattern.reach, FAR),
        max(prefix, 0),  # keys before this are seen by all
        max(leading, 0),  # queries before this see all
        pattern.dilation,
        pattern.stride or 0,
    )
    valid = pattern.key_valid
    allowed = pattern.dense if valid is None else valid[:, None, None]
    starts = None  # padding on the left, which is most of a batch of unequal lengths, is not read
    if valid is not None and pattern.kv_len > 0:
        starts = valid.to(torch.uint8).argmax(1)
    steps = pattern.is_sparse and (pattern.dilation > 1 or pattern.stride is not None)
    return Plan(numbers, pattern.is_sparse, steps, _most_keys(pattern), offset, starts, allowed)


def _most_keys(pattern: Pattern) -> int:
    """An upper bound of the keys that are visited, where numbers tell; decides speed only."""
    most = pattern.kv_len
    if isinstance(pattern.q_offset, int) and pattern.causal and pattern.q_positions is None:
        seen = pattern.q_offset - pattern.kv_offset + pattern.q_len
        most = min(most, max(seen, 0))
    near = pattern.band
    if pattern.is_sparse and pattern.stride is None and pattern.global_tokens is None:
        reach = pattern.reach or 1
        near = reach if near is None else min(near, reach)
    if near is not None:
        first_tokens = max(pattern.num_sink_tokens, pattern.num_global_tokens)
        span = near if pattern.causal else 2 * near - 1
        most = min(most, span + pattern.q_len - 1 + first_tokens)
    return most


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured (other than by ``torch.compile``, which traces)."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()


def derive_anew(pattern: Pattern, key: Hashable, make: Callable[[], T]) -> T:
    """`Pattern.derive`, and again after a write to a tensor of the pattern, such as a static mask.

    Tensors made under ``torch.inference_mode`` do not tell of writes; for them nothing is kept.
    """
    tensors = pattern.derive("tensors", lambda: tuple(pattern.tensors().values()))
    if not tensors or torch.compiler.is_compiling():
        return pattern.derive(key, make)
    if any(tensor.is_inference() for tensor in tensors):
        return make()
    versions = tuple(tensor._version for tensor in tensors)
    kept: list[tuple[tuple[int, ...], T]] = pattern.derive((key, "last"), list)
    last = kept[-1] if kept else None
    if last is None or last[0] != versions:
        last = (versions, make())
        kept[:] = [last]
    return last[1]


def _pairs(pattern: Pattern, device: torch.device, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The visible pairs written out, and the key blocks that hold any."""

    def make(pattern: Pattern = pattern) -> tuple[Tensor, Tensor, Tensor]:
        mask = _written_out(pattern, device)
        return mask, *_listed(mask, block)

    if is_capturing(device):
        return make(pattern.replace())  # nothing derived before: a replay evaluates it all anew
    return derive_anew(pattern, ("decoded pairs", str(device), block), make)


def _written_out(pattern: Pattern, device: torch.device) -> Tensor:
    """`Pattern.visible`, many keys at a time: it holds several numbers per pair."""
    chunk = _CHUNK_PAIRS // max(pattern.q_len, 1)
    if pattern.kv_len <= chunk:
        return pattern.visible(device)
    starts = range(0, pattern.kv_len, chunk)
    parts = [pattern.visible(device, 0, None, start, start + chunk) for start in starts]
    return torch.cat(parts, -1)


def _listed(mask: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The key blocks with a visible pair, ascending, and their number, per batch row."""
    seen = mask.flatten(1, 2).any(1)
    missing = -seen.shape[1] % block
    seen = torch.nn.functional.pad(seen, (0, missing)).unflatten(1, (-1, block)).any(2)
    place = seen.cumsum(1)
    count = seen.shape[1]
    index = torch.arange(count, device=mask.device, dtype=torch.int32).expand_as(seen)
    blocks = torch.zeros(len(seen), count + 1, device=mask.device, dtype=torch.int32)
    # Blocks without a pair all go to the place after the last, which nothing reads.
    blocks = blocks.scatter(1, torch.where(seen, place - 1, count), index)
    return blocks, place[:, -1].to(torch.int32)
