"""Who is measured over several GPUs: our schedules, and PyTorch's ``context_parallel``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugin import attention
from hf_attn_plugin.parallel import Shapes, Shard, choose, sharded_attention
from hf_attn_plugin.patterns import Pattern

from .cases import Case
from .numerics import Attention, Inputs
from .ring_team import Team

SINGLE = "one GPU"
"""The contender that computes everything on rank 0, to whose time the others are compared."""

CHOICE = "chosen"
"""The contender whose schedule and layout are chosen by `hf_attn_plugin.parallel`."""


DRAWN = ("ulysses", "gather", "ring", "cp-flash-allgather")
"""The contenders whose timelines are kept and drawn."""


@dataclasses.dataclass(frozen=True)
class Sharded:
    """An attention call that all ranks make, each on its part of the tokens.

    Attributes:
        take: This rank's part of a tensor ``[batch, heads, tokens, dim]`` of the whole sequence.
        call: Attention on these parts.
        join: The whole of a result, on every rank.
        scope: Makes the block in which it is called, backward included.
        about: How the sequence is spread, in a few words.
    """

    take: Callable[[Tensor], Tensor]
    call: Attention
    join: Callable[[Tensor], Tensor]
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    about: str = ""

    def local(self, inputs: Inputs) -> Inputs:
        """This rank's part of inputs, as leaves of their own."""
        query, key, value = (
            self.take(leaf.detach()).clone().requires_grad_() for leaf in inputs.leaves
        )
        return Inputs(query, key, value, self.take(inputs.grad).clone())


@dataclasses.dataclass(frozen=True)
class RingContender:
    """A way to share attention between ranks.

    Attributes:
        name: What it is called on the command line and in tables.
        title: In a few words.
        spread: Makes the call for a case, its pattern and this process.
        ours: Whether it is this project's.
        masked: Whether it is known to take more than plain causal attention; what others do with a
            mask is tried at a short length.
        refuses: Says why it cannot spread a case over so many ranks, or None.
    """

    name: str
    title: str
    spread: Callable[[Case, Pattern, Team], Sharded]
    ours: bool = False
    masked: bool = False
    refuses: Callable[[Case, int], str | None] = lambda case, ranks: None


def _heads(case: Case, ranks: int) -> str | None:
    return _shapes(case).refuses(ranks)


def ring_contenders() -> dict[str, RingContender]:
    """All of them by name; the one that does without other ranks first."""
    sdpa = torch.nn.attention.SDPBackend
    found = [
        RingContender(SINGLE, "hf_attn_plugin, everything on rank 0", _single, True, True),
        *(
            RingContender(
                name, f"hf_attn_plugin, {text}", functools.partial(_ours, schedule), True, True
            )
            for name, schedule, text in (
                (CHOICE, None, "the choice"),
                ("gather", "gather", "keys gathered"),
                ("ring", "ring", "keys travel"),
            )
        ),
        RingContender(
            "ulysses",
            "hf_attn_plugin, heads exchanged for tokens",
            functools.partial(_ours, "ulysses"),
            True,
            True,
            _heads,
        ),
        *(
            RingContender(
                f"cp-{name}-{rotation}",
                f"torch context_parallel, {text}, {rotation}",
                functools.partial(_context_parallel, backend, rotation),
            )
            for name, backend, text in (
                ("flash", sdpa.FLASH_ATTENTION, "FlashAttention-2"),
                ("cudnn", sdpa.CUDNN_ATTENTION, "cuDNN"),
            )
            for rotation in ("allgather", "alltoall")
        ),
    ]
    return {contender.name: contender for contender in found}


def chosen_contenders(peers: list[str] | None) -> list[RingContender]:
    """Ours, and the peers by name; all of them where None is given.

    Raises:
        ValueError: There is no such peer.
    """
    found = ring_contenders()
    known = [name for name, contender in found.items() if not contender.ours]
    unknown = [name for name in peers or () if name not in known]
    if unknown:
        raise ValueError(
            f"no peer of hf-attn bench ring is named {', '.join(unknown)}: choose from "
            f"{', '.join(known)}"
        )
    wanted = known if peers is None else peers
    return [one for name, one in found.items() if one.ours or name in wanted]


# -- ours ------------------------------------------------------------------------------------------


def _single(case: Case, pattern: Pattern, team: Team) -> Sharded:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, pattern, need_lse=False)[0]

    return Sharded(lambda tensor: tensor, call, lambda tensor: tensor)


def _shapes(case: Case) -> Shapes:
    return Shapes(heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim)


def _ours(schedule: str | None, case: Case, pattern: Pattern, team: Team) -> Sharded:
    choice = choose(pattern, team.size, _shapes(case), schedule=schedule)
    shard = Shard(choice.layout, team.rank, None, choice.ulysses, choice.schedule)
    layout, scaling = choice.layout, case.head_dim**-0.5

    def take(tensor: Tensor) -> Tensor:
        # As models hand them over: in memory token by token.
        return layout.take(tensor.transpose(1, 2), team.rank).transpose(1, 2)

    def join(local: Tensor) -> Tensor:
        return layout.join(team.all_parts(local), dim=2)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sharded_attention(query, key, value, pattern, shard, scaling=scaling)

    return Sharded(take, call, join, about=str(choice))


# -- PyTorch's -------------------------------------------------------------------------------------


def _context_parallel(
    backend: Any, rotation: str, case: Case, pattern: Pattern, team: Team
) -> Sharded:
    """``context_parallel`` as accelerate uses it; a pattern it has no name for is a dense mask."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import (
        context_parallel_unshard,
        set_rotate_method,
    )

    mesh = init_device_mesh(team.device.type, (team.size,))

    def take(tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        with context_parallel(mesh, buffers=[own], buffer_seq_dims=[2], no_restore_buffers={own}):
            return own

    mask = None if case.is_plain_causal else take(pattern.visible(team.device))

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        set_rotate_method(rotation)
        something = torch.zeros(1, 1, 2 * team.size, device=team.device)
        with (
            torch.nn.attention.sdpa_kernel([backend]),
            warnings.catch_warnings(),
            context_parallel(mesh, buffers=[something], buffer_seq_dims=[2]),
        ):
            warnings.simplefilter("ignore")
            yield

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )

    def join(local: Tensor) -> Tensor:
        return context_parallel_unshard(mesh, [local.detach()], [2])[0]

    return Sharded(take, call, join, scope)
