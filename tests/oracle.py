"""Attention written out pair by pair, without any of the package's machinery."""

from __future__ import annotations

import functools

import torch


def oracle_mask(batch: int, q_len: int, kv_len: int, spec: dict) -> torch.Tensor:
    """bool [batch, q_len, kv_len] from a plain description of the pattern.

    `spec` has the names of `Pattern`'s fields; tensors are nested lists.
    """
    mask = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    causal = spec.get("causal", True)
    kv_offset = spec.get("kv_offset", 0)
    q_offset = spec.get("q_offset")
    if q_offset is None:
        q_offset = kv_offset + kv_len - q_len
    sparse = (
        any(spec.get(n) for n in ("window", "stride", "num_sink_tokens", "num_global_tokens"))
        or spec.get("global_tokens") is not None
    )
    for b in range(batch):

        def row(name: str, b: int = b):
            value = spec.get(name)
            return None if value is None else value[b % len(value)]

        valid, kv_doc, q_doc = row("key_valid"), row("kv_documents"), row("q_documents")
        marked = row("global_tokens")

        first = functools.partial(_is_first, valid=valid, kv_doc=kv_doc, kv_offset=kv_offset)
        sinks = [first(j, spec.get("num_sink_tokens", 0)) for j in range(kv_len)]
        globals_ = [
            first(j, spec.get("num_global_tokens", 0)) or (marked is not None and bool(marked[j]))
            for j in range(kv_len)
        ]
        for i in range(q_len):
            at = q_offset + i
            own = at - kv_offset  # the key index of the query's own token
            q_global = 0 <= own < kv_len and globals_[own]
            for j in range(kv_len):
                d = at - (kv_offset + j)
                if causal and d < 0:
                    continue
                if spec.get("band") is not None and abs(d) >= spec["band"]:
                    continue
                if valid is not None and not valid[j]:
                    continue
                if kv_doc is not None and q_doc[i] != kv_doc[j]:
                    continue
                if sparse:
                    window, dilation = spec.get("window"), spec.get("dilation", 1)
                    near = window and abs(d) < window * dilation and d % dilation == 0
                    strided = spec.get("stride") and d % spec["stride"] == 0
                    if not (near or strided or sinks[j] or globals_[j] or q_global):
                        continue
                mask[b, i, j] = True
    return mask


def _is_first(j: int, count: int, *, valid, kv_doc, kv_offset: int) -> bool:
    """Whether key j is among the first valid tokens of its document."""
    if valid is None and kv_doc is None:
        return kv_offset + j < count
    before = 0
    for other in range(j - 1, -1, -1):
        if kv_doc is not None and kv_doc[other] != kv_doc[j]:
            break
        before += valid is None or valid[other]
    return before < count and (valid is None or bool(valid[j]))


def oracle_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the visible pairs, head by head, in the inputs' dtype, differentiable.

    Rows are handled through a finite fill value, so that this shares no trick with the package.
    """
    outputs, sums = [], []
    groups = query.shape[1] // key.shape[1]
    for h in range(query.shape[1]):
        k, v = key[:, h // groups], value[:, h // groups]
        scores = torch.einsum("bid,bjd->bij", query[:, h], k) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        fill = -1e4 if scores.dtype == torch.float16 else -1e30
        scores = torch.where(mask, scores, fill)
        if sinks is not None:
            extra = sinks[h].to(scores.dtype).expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, extra], -1)
        top = scores.detach().amax(-1, keepdim=True)
        seen = mask if sinks is None else torch.cat([mask, torch.ones_like(mask[..., :1])], -1)
        weights = torch.exp(scores - top) * seen
        total = weights.sum(-1, keepdim=True)
        some = total > 0
        safe = torch.where(some, total, torch.ones_like(total))
        outputs.append(torch.einsum("bij,bjd->bid", (weights / safe)[..., : k.shape[1]], v))
        lse = torch.where(some, top + torch.log(safe), float("-inf"))
        sums.append(lse[..., 0])
    return torch.stack(outputs, 1), torch.stack(sums, 1)
