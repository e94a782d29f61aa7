"""The gate of SparQ's decoding step: its output against the definition in float64.

Which k keys are chosen hangs on rounding where masses are nearly equal, and one key more or less is
an error far above rounding. So the output is compared with that of the nearest choice that the
definition allows: keys whose approximate mass is within `TOLERANCE` of the least one chosen may be
exchanged for each other, nothing else. Components with equal magnitudes may be, too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_attn_plugin.ops.choice import Choice
from hf_attn_plugin.ops.reference import reference_attention
from hf_attn_plugin.ops.sparq.key_copy import Components, FullComponents, QuantizedComponents
from hf_attn_plugin.patterns import Pattern

from .numerics import share_of_budget

TOLERANCE = 2**-7
"""Relative difference of two masses that rounding queries to bfloat16 may turn round."""

_EQUAL = 1e-6  # relative difference of two sums of |q| that another order of addition makes
_MOST_CHOICES = 64
_MOST_BORDER = 200
# Far above what exchanged keys make, and below the 1.4 of an unrelated vector of the same size.
_COARSE = 0.7


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step of SparQ reads.

    Attributes:
        rank: Components r.
        top_k: Keys k, at most.
        key_copy: How the keys are kept a second time.
        coverage: Share of the mass that the keys must have; None takes ``top_k`` always.
    """

    rank: int = 32
    top_k: int = 128
    key_copy: str = "full"
    coverage: float | None = None

    @property
    def local_window(self) -> int:
        """Most recent keys that are always chosen: `SparQConfig`'s default."""
        return self.top_k // 4

    @property
    def title(self) -> str:
        """In a few words."""
        words = [f"r={self.rank}"]
        if self.coverage is not None:
            words.append(f"coverage={self.coverage:g}")
        words.append(f"k{'=' if self.coverage is None else '≤'}{self.top_k}")
        if self.key_copy != "full":
            words.append(f"copy={self.key_copy}")
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far from the definition an output is.

    Attributes:
        share: The worst error as a share of what is allowed.
        exchanged: Keys, per key/value head that was looked at, in which the nearest choice differs
            from that of float64; the mean.
    """

    share: float
    exchanged: float


def judge(
    setting: Setting,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    components: Components | None,
    output: Tensor,
    pairs: Iterable[tuple[int, int]],
) -> Verdict:
    """Compare a step's output in some batch rows and key/value heads.

    Args:
        setting: Of the step.
        query: [B, H, 1, D].
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, Dv].
        components: The copy that the step reads; None where it reads the keys.
        output: [B, H, 1, Dv].
        pairs: Batch row and key/value head.
    """
    groups = query.shape[1] // keys.shape[1]
    worst, exchanged = 0.0, []
    if not bool(output.isfinite().all()):
        return Verdict(float("inf"), float("nan"))
    for row, head in pairs:
        own = slice(head * groups, (head + 1) * groups)
        q, k, v = query[row, own, 0], keys[row, head], values[row, head]
        got = output[row, own, 0]
        copy = (
            FullComponents(k.mT[None, None]) if components is None else _one(components, row, head)
        )
        shares = []
        for mass in _masses(setting, q.double(), copy):
            chosen, moved = _nearest(
                setting, mass, q.double(), k.double(), v.double(), got.double()
            )
            want, plain = (
                _attend(q.to(t), k[chosen].to(t), v[chosen].to(t)) for t in (torch.float64, q.dtype)
            )
            shares.append((share_of_budget(got[:, None], want, plain), moved))
        share, moved = min(shares)
        worst = max(worst, share)
        exchanged.append(moved)
    return Verdict(worst, sum(exchanged) / len(exchanged))


def unrelated_rows(output: Tensor, other: Tensor) -> int:
    """Heads of a step's output [B, H, 1, Dv] that have nothing to do with those of another step.

    Their queries must be free of ties (see `part_ties`).
    """
    apart = (output.float() - other.float()).norm(dim=-1)
    return int((~(apart <= _COARSE * other.float().norm(dim=-1))).sum())


def part_ties(query: Tensor, kv_heads: int) -> Tensor:
    """The query [B, H, 1, D], in 16 bits, with no two components that are of equal size.

    In a few bits that is common, and either of two equal components is a right choice, after which
    many of the keys chosen are others. Some elements grow by the least possible amount, until the
    sums of |q| over the heads that share keys differ.
    """
    query = query.clone()
    shape = (query.shape[0], kv_heads, -1, query.shape[-1])
    grouped, first_bits = query.view(shape), query.view(torch.int16).view(shape)[:, :, 0]
    while True:
        ranked, order = grouped.double().abs().sum(2).sort(-1)
        equal = ranked.diff(dim=-1) <= 2 * _EQUAL * ranked[..., 1:]
        if not bool(equal.any()):
            return query
        equal = torch.nn.functional.pad(equal, (1, 0))
        first_bits += torch.zeros_like(equal).scatter(-1, order, equal)


def _one(components: Components, row: int, head: int) -> Components:
    """The copy of one key/value head."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[row, None, head, None]

    if isinstance(components, FullComponents):
        return FullComponents(cut(components.keys_t))
    assert isinstance(components, QuantizedComponents)
    return dataclasses.replace(
        components,
        codes=cut(components.codes),
        scale=cut(components.scale),
        offset=cut(components.offset),
        tail=cut(components.tail),
    )


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention [G, 1, Dv] of the queries [G, D] over all of the keys [n, D]."""
    pattern = Pattern(q_len=1, kv_len=len(keys), causal=False)
    output, _ = reference_attention(
        query[None, :, None], keys[None, None], values[None, None], pattern
    )
    return output[0]


def _masses(setting: Setting, query: Tensor, copy: Components) -> list[Tensor]:
    """The approximate softmax [S] of the queries [G, D], summed, for every choice of components."""
    magnitude = query.abs()
    total, head_dim = magnitude.sum(0), query.shape[-1]
    rank = min(setting.rank, head_dim)
    least = total.topk(rank).values[-1]
    near = (total - least).abs() <= _EQUAL * least
    sure = ((total > least) & ~near).nonzero()[:, 0].tolist()
    rest = itertools.combinations(near.nonzero()[:, 0].tolist(), rank - len(sure))
    masses = []
    for tied in itertools.islice(rest, _MOST_CHOICES):
        index = torch.tensor([*sure, *tied], device=query.device)
        part = query[:, index]
        covered = part.abs().sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True)
        part = part * (head_dim**-0.5 / covered.clamp_min(torch.finfo(part.dtype).tiny).sqrt())
        scores, _ = copy.scores(part[None, None], Choice(index[None, None]))
        masses.append(scores[0, 0].softmax(-1).sum(0))
    return masses


def _nearest(
    setting: Setting, mass: Tensor, query: Tensor, keys: Tensor, values: Tensor, got: Tensor
) -> tuple[Tensor, int]:
    """The allowed choice whose attention is nearest to ``got`` [G, Dv].

    Returns:
        Indices of the keys, and how many of them the float64 choice has not.
    """
    length = len(mass)
    ranking = mass.clone()
    ranking[length - min(setting.local_window, length) :] = torch.inf
    ranked, order = ranking.topk(min(setting.top_k, length))
    least = most = usual = len(order)
    if setting.coverage is not None:
        before = mass[order].cumsum(0) - mass[order]
        window = int(ranked.isposinf().sum())
        goal, total = setting.coverage * mass.sum(), mass.sum()
        least, usual, most = (
            max(1, window, int((before < goal + slack * total).sum()))
            for slack in (-TOLERANCE, 0.0, TOLERANCE)
        )
    highest, lowest = ranked[least - 1] * (1 + TOLERANCE), ranked[most - 1] * (1 - TOLERANCE)
    border = ((ranking <= highest) & (ranking >= lowest) & ~ranking.isposinf()).nonzero()[:, 0]
    certain = ((ranking > highest) | ranking.isposinf()).nonzero()[:, 0]
    if len(border) > _MOST_BORDER:
        raise ValueError(f"{len(border)} keys have nearly the same mass: no such check is made.")
    border = border[mass[border].argsort(descending=True)]
    picked = torch.arange(len(border), device=mass.device) < usual - len(certain)
    start = picked.clone()

    scores = (query * query.shape[-1] ** -0.5) @ keys.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    above, below = weights[:, certain] @ values[certain], weights[:, certain].sum(-1)
    border_weights, border_values = weights[:, border], values[border]

    def errors(candidates: Tensor) -> Tensor:
        """Of choices [n, border]."""
        chosen = candidates[:, None] * border_weights  # [n, G, border]
        outputs = (above + chosen @ border_values) / (below + chosen.sum(-1))[..., None]
        return (outputs - got).square().sum((1, 2))

    best = errors(picked[None].to(mass.dtype))[0]
    while True:
        moves = _moves(picked, least - len(certain), most - len(certain))
        if not len(moves):
            break
        all_errors = errors(moves.to(mass.dtype))
        at = int(all_errors.argmin())
        if not bool(all_errors[at] < best):
            break
        picked, best = moves[at], all_errors[at]
    return torch.cat([certain, border[picked]]), int((picked & ~start).sum())


def _moves(picked: Tensor, least: int, most: int) -> Tensor:
    """Choices [n, border] that differ from ``picked`` in one key, or in two exchanged ones."""
    inside, outside = picked.nonzero()[:, 0], (~picked).nonzero()[:, 0]
    pairs = [(int(i), int(o)) for i in inside for o in outside]
    flips = [(int(i),) for i in inside] if len(inside) > least else []
    flips += [(int(o),) for o in outside] if len(inside) < most else []
    moves = picked.expand(len(pairs) + len(flips), -1).clone()
    for move, changed in zip(moves, [*pairs, *flips], strict=True):
        for at in changed:
            move[at] = ~move[at]
    return moves
