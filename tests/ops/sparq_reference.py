"""SparQ's decoding step written out in numpy, head by head: slow, and independent of ours."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from hf_attn_plugin.ops.choice import Choice


def numpy_softmax(scores, visible, sink=None):
    """Softmax over the visible entries; the sink is one more term of the denominator."""
    weights = np.where(visible, np.exp(scores), 0.0)
    return weights / (weights.sum() + (0.0 if sink is None else math.exp(sink)))


def fewest(order, mass, wanted, least):
    """The shortest beginning of ``order``, at least ``least``, whose mass is ``wanted``."""
    for n in range(least, len(order)):
        if mass[order[:n]].sum() >= wanted:
            return order[:n]
    return order


def left_out(weights, values, v_mean, seen, chosen, block):
    """The mass of the keys left out times the mean value, of all or of those of a block."""
    if block is None:
        return (1 - weights[list(chosen)].sum()) * v_mean
    left = sorted({*np.flatnonzero(seen)} - {*chosen})
    output = np.zeros_like(v_mean)
    for b in {j // block for j in left}:
        members = [j for j in left if j // block == b]
        output += weights[members].sum() * values[members].mean(axis=0)
    return output


def quantized_copy(keys, bits, group, filled=None):
    """Keys [B, Hkv, S, D] with every whole group of the first ``filled`` positions quantised."""
    copied = keys.clone()
    batch, kv_heads, length, width = keys.shape
    for start in range(0, (length if filled is None else filled) // group * group, group):
        for at in itertools.product(range(batch), range(kv_heads), range(width)):
            column = keys[at[0], at[1], start : start + group, at[2]]
            step = (column.max() - column.min()) / (2**bits - 1)
            step = step if step > 0 else torch.ones_like(step)
            codes = ((column - column.min()) / step).round().clamp(0, 2**bits - 1)
            copied[at[0], at[1], start : start + group, at[2]] = column.min() + codes * step
    return copied


def rows_of(components, index, dtype=torch.float64):
    """The components ``index`` [B, Hkv, r] of a copy, [B, Hkv, r, S], and the bytes read."""
    r = index.shape[-1]
    return components.scores(torch.eye(r, dtype=dtype).expand(*index.shape, r), Choice(index))


def numpy_sparq(
    query, keys, values, *, rank, top_k, local_window, reallocate, scaling=None, visible=None,
    softcap=None, sinks=None, coverage=None, rank_coverage=None, mean_block=None, copied=None,
    used=None,
):  # fmt: skip
    """Algorithm 1 of arXiv 2312.04985 with its rule for grouped queries, in float64 loops.

    And with this package's options: ``copied`` are the keys as the second copy has them, [B, Hkv,
    S, D]; ``used`` is a list that gets (components, keys) of every sequence and KV head.
    """
    copied = keys if copied is None else copied
    query, keys, values, copied = (t.double().numpy() for t in (query, keys, values, copied))
    batch, heads, _, d = query.shape
    kv_heads, length = keys.shape[1:3]
    group = heads // kv_heads
    scaling = 1 / math.sqrt(d) if scaling is None else scaling
    cap = (lambda s: s) if softcap is None else (lambda s: softcap * np.tanh(s / softcap))
    output = np.zeros((batch, heads, 1, values.shape[-1]))
    for b in range(batch):
        seen = np.ones(length, bool) if visible is None else visible.expand(batch, -1)[b].numpy()
        if not seen.any():
            continue
        v_mean = values[b][:, seen].mean(axis=1)
        for kv in range(kv_heads):
            members = range(kv * group, (kv + 1) * group)
            magnitude = sum(np.abs(query[b, h, 0]) for h in members)
            i1 = np.argsort(-magnitude)[:rank]
            if rank_coverage is not None:
                wanted = rank_coverage * magnitude.sum()
                i1 = fewest(i1, magnitude, wanted, 1)
            approximate = {}
            for h in members:
                q = query[b, h, 0]
                tau = math.sqrt(d * np.abs(q[i1]).sum() / np.abs(q).sum())
                # tau stands in for sqrt(d); `scaling` may be something else than 1 / sqrt(d).
                scores = copied[b, kv][:, i1] @ q[i1] / tau * (scaling * math.sqrt(d))
                sink = None if sinks is None else float(sinks[h])
                approximate[h] = numpy_softmax(cap(scores), seen, sink)
            mass = sum(approximate.values())
            ranking = mass.copy()
            ranking[~seen] = -1
            recent = np.flatnonzero(seen)[-local_window:] if local_window else []
            ranking[recent] = np.inf
            i2 = [j for j in np.argsort(-ranking)[:top_k] if seen[j]]
            if coverage is not None:
                i2 = fewest(i2, mass, coverage * mass.sum(), max(1, len(recent)))
            if used is not None:
                used.append((len(i1), len(i2)))
            for h in members:
                scores = cap(keys[b, kv][i2] @ query[b, h, 0] * scaling)
                sink = None if sinks is None else float(sinks[h])
                y = numpy_softmax(scores, np.ones(len(i2), bool), sink) @ values[b, kv][i2]
                if reallocate:
                    y = approximate[h][i2].sum() * y
                    y = y + left_out(
                        approximate[h], values[b, kv], v_mean[kv], seen, i2, mean_block
                    )
                output[b, h, 0] = y
    return torch.from_numpy(output)
