"""How the windowed methods work over a cache that keeps only what they see."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugin.methods.call import AttentionCall, attend, once
from hf_attn_plugin.ops.window_state import FirstTokens, KeptKeys
from hf_attn_plugin.patterns import Pattern, PatternMask


def mask_of_kept(
    attention_mask: Tensor | PatternMask | None, kept: KeptKeys | None
) -> Tensor | PatternMask | None:
    """A caller's own 4D mask, which covers all tokens seen, for the keys that are kept."""
    if kept is None or not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        return attention_mask
    return attention_mask[..., kept.start - kept.slots :]


def attend_in_window(
    call: AttentionCall, pattern: Pattern, kept: KeptKeys | None, num_first: int
) -> tuple[Tensor, None]:
    """`attend`, over a bounded cache too, which then drops what no later token sees.

    Args:
        call: The call.
        pattern: Its pattern with the method's terms: a window, and ``num_first`` first tokens of
            every sequence that all see.
        kept: What the cache says of the call's keys; None where it keeps all.
        num_first: First tokens that all see.
    """
    reach = pattern.reach
    if kept is None or reach is None:
        return attend(call, pattern)
    kept.check(reach, num_first)
    if kept.firsts is not None:
        _refuse_unknown(call, pattern)
        pattern = once(
            pattern, "kept", (kept.firsts,), lambda: _over_kept(pattern, kept, num_first)
        )
    output = attend(call, pattern, tokens_seen=kept.seen)
    own = call.pattern
    if pattern.global_tokens is not None or own.kv_documents is not None:
        # The former may be named again in a later call. The latter have first tokens of their own.
        kept.store.keep_all = True
    kept.settle(reach, num_first, lambda count: _first_tokens(call, kept, num_first, count))
    return output


def _refuse_unknown(call: AttentionCall, pattern: Pattern) -> None:
    """What says of every pair whether it attends does not tell of tokens out of their place."""
    if pattern.dense is None and pattern.kv_documents is None and pattern.global_tokens is None:
        return
    raise ValueError(
        f"attn_implementation={call.method!r} keeps the first and the last tokens of its cache "
        "only, and this call's mask (one of the model's own kind, packed documents, or "
        "global_attention_mask) is not known for them. Pass past_key_values=DynamicCache(), which "
        "keeps all tokens."
    )


def _over_kept(pattern: Pattern, kept: KeptKeys, num_first: int) -> Pattern:
    """The pattern over ``[first tokens | last tokens]``, of which it knows the latter.

    In a decoder a global token sees no more than the tokens before it, which are global too. So
    global tokens are sink tokens here.
    """
    firsts = kept.firsts
    assert firsts is not None
    slots, device = kept.slots, firsts.device
    positions = pattern.key_positions(device)[:, slots:]
    ranks = pattern.key_ranks(device)[:, slots:]
    valid = torch.ones_like(positions, dtype=torch.bool)
    if pattern.key_valid is not None:
        valid = pattern.key_valid[:, slots:]
    slot_ranks = torch.arange(slots, device=device).expand_as(firsts)
    return pattern.replace(
        num_sink_tokens=num_first,
        num_global_tokens=0,
        q_offset=None,
        kv_offset=0,
        q_positions=pattern.query_positions(device),
        kv_positions=_joined(firsts.clamp(min=0), positions),
        key_valid=_joined(firsts >= 0, valid),
        kv_ranks=_joined(slot_ranks, ranks),
    )


def _joined(first: Tensor, last: Tensor) -> Tensor:
    """``[batch, slots]`` and ``[batch or 1, rest]`` side by side."""
    return torch.cat([first, last.expand(first.shape[0], -1)], 1)


def _first_tokens(call: AttentionCall, kept: KeptKeys, num_first: int, count: int) -> FirstTokens:
    """Which first tokens a layer keeps; worked out once for all layers of a forward pass."""
    own, device = call.pattern, call.key.device

    def make() -> FirstTokens:
        flags = own.key_ranks(device) < num_first
        if own.key_valid is not None:
            flags = flags & own.key_valid
        flags = flags[:, kept.slots : kept.slots + count]
        return kept.choose(flags, num_first, call.key.shape[0])

    tensors = () if kept.firsts is None else (kept.firsts,)
    return once(own, ("first tokens", num_first, kept.start, count), tensors, make)
