"""Keys and values of one layer under a window: the first tokens of every sequence, and the last.

The cache layer cannot know what to keep: padding is unknown to it, so it does not see where
sequences start, and the window is the method's. So `WindowStore` only ever drops keys when the
attention function, having read the model's mask, tells it to. A model in which that function never
meets what the cache returned (multi-head latent attention makes keys from it first) keeps all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ATTRIBUTE = "_hf_attn_window"


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """The first tokens of every row, as picked from the keys that a layer holds.

    Attributes:
        columns: int64 ``[batch, slots]``, where they are.
        positions: int64 ``[batch, slots]``, their positions; -1 where a row has none.
        complete: Whether no row lacks any.
    """

    columns: Tensor
    positions: Tensor
    complete: bool


@dataclass(eq=False)
class WindowStore:
    """What a layer holds: ``[first tokens | last tokens]``, the latter without gaps.

    Attributes:
        keys: ``[batch, kv_heads, slots + last tokens, head_dim]``.
        values: ``[batch, kv_heads, slots + last tokens, value_dim]``.
        seen: Tokens cached so far, dropped ones included.
        start: Position of the first of the last tokens; those before it are dropped, but for the
            first tokens.
        firsts: int64 ``[batch, slots]``, positions of the first tokens of each row, ascending; -1
            in slots that a row has no token for. None while nothing is dropped.
        complete: Whether every row has all its first tokens; then no more are looked for.
        keep_all: Drop nothing for now, as tokens may be taken back (assisted generation).
        reach: What was kept at the last dropping, in positions before the next query; None before.
        num_first: First tokens that were kept at the last dropping.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    seen: int = 0
    start: int = 0
    firsts: Tensor | None = None
    complete: bool = False
    keep_all: bool = False
    reach: int | None = None
    num_first: int = 0

    @property
    def slots(self) -> int:
        """Columns before the last tokens."""
        return 0 if self.firsts is None else self.firsts.shape[1]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``[batch, kv_heads, new, dim]``; return all that is held, described by `KeptKeys`."""
        if self.slots and torch.compiler.is_compiling():
            raise ValueError(
                "a cache that keeps first tokens and a window, and has dropped others, cannot be "
                "gone on with under torch.compile. Use cache_implementation='static'."
            )
        new = keys.shape[2]
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.seen += new
        self.keys, self.values = keys, values
        if torch.compiler.is_compiling():
            return keys, values
        # A tensor of its own carries the description: it points back here, and must not do so from
        # what is held here.
        shown = keys.view_as(keys)
        setattr(shown, _ATTRIBUTE, KeptKeys(self, self.seen, self.start, self.firsts))
        return shown, values

    def drop(self, start: int, num_first: int, choose: Callable[[], FirstTokens]) -> None:
        """Keep the last tokens from position ``start`` on, and first tokens of those before.

        Args:
            start: Position.
            num_first: First tokens to keep of every row.
            choose: Says which.
        """
        if self.keep_all or start <= self.start or self.keys is None:
            return
        if start <= num_first and self.firsts is None:  # a few tokens, most of them first ones
            return
        slots, dropped = self.slots, start - self.start
        if num_first == 0:
            self.firsts = None
            self._hold(lambda held: _cut(held[:, :, slots:], 0, dropped))
        elif self.complete and slots == num_first:
            self._hold(lambda held: _cut(held, slots, dropped))
        else:
            chosen = choose()
            self.firsts, self.complete = chosen.positions, chosen.complete
            self._hold(lambda held: _gather(held, chosen.columns, slots + dropped))
        self.start = start

    def _hold(self, function: Callable[[Tensor], Tensor]) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = function(self.keys), function(self.values)

    def crop(self, count: int) -> None:
        """Take the last ``count`` tokens back.

        Raises:
            ValueError: The window of the tokens left would begin with dropped ones.
        """
        if count == 0 or self.keys is None:
            return
        left = self.seen - count
        if left < 0 or (self.reach is not None and self.start > max(left - self.reach + 1, 0)):
            raise ValueError(
                f"the last {count} tokens cannot be taken back: the cache keeps only what the "
                "attention's window sees, and what the tokens before them saw is dropped. Call "
                "cache.activate_past_recording() before adding tokens that may be taken back (as "
                "assisted generation does), or pass past_key_values=DynamicCache(), which keeps "
                "all tokens."
            )
        self._hold(lambda held: held[:, :, : held.shape[2] - count])
        self.seen = left

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor; it picks rows."""
        if self.keys is not None:
            self._hold(function)
        if self.firsts is not None:
            self.firsts = function(self.firsts)


@dataclass(frozen=True, eq=False)
class KeptKeys:
    """Which tokens the keys of one call are; left on the tensor that the cache returned.

    Attributes:
        store: Where they are held.
        seen: Tokens of the sequences so far, the new ones included.
        start: Position of the first key after the slots.
        firsts: As in `WindowStore`.
    """

    store: WindowStore = field(repr=False)
    seen: int
    start: int
    firsts: Tensor | None

    @property
    def slots(self) -> int:
        """Columns before the last tokens."""
        return 0 if self.firsts is None else self.firsts.shape[1]

    def check(self, reach: int, num_first: int) -> None:
        """Refuse a wider window, or more first tokens, than was kept until now.

        Args:
            reach: Distance + 1 to the last key seen.
            num_first: First tokens that are seen.
        """
        held = self.store.reach
        if self.start and held is not None and (reach > held or num_first > self.store.num_first):
            raise ValueError(
                f"this cache was filled under a window of {held} keys and {self.store.num_first} "
                f"first tokens and has dropped the others, and now {reach} and {num_first} are "
                "wanted. Start with a new cache, or pass past_key_values=DynamicCache() from the "
                "start, which keeps all tokens."
            )

    def settle(self, reach: int, num_first: int, choose: Callable[[int], FirstTokens]) -> None:
        """Let the cache drop what no later query sees.

        Args:
            reach: Distance + 1 to the last key that a query sees.
            num_first: First tokens that are seen besides.
            choose: Which these are, given how many of the keys after the slots go.
        """
        store = self.store
        if store.seen != self.seen:  # another layer shares these keys and was here before
            return
        start = self.seen - reach + 1
        store.drop(start, num_first, lambda: choose(start - self.start))
        if store.start > 0:
            store.reach, store.num_first = reach, num_first

    def choose(self, is_first: Tensor, num_first: int, batch: int) -> FirstTokens:
        """Pick the first tokens of every row from the slots and from keys that go.

        Args:
            is_first: bool ``[batch or 1, keys that go]``: whether they are among the first
                ``num_first`` valid tokens of their row.
            num_first: Slots to fill.
            batch: Rows.
        """
        device, count = is_first.device, is_first.shape[1]
        wanted = is_first.expand(batch, -1)
        positions = torch.arange(self.start, self.start + count, device=device).expand(batch, -1)
        if self.firsts is not None:
            wanted = torch.cat([self.firsts >= 0, wanted], 1)
            positions = torch.cat([self.firsts, positions], 1)
        # Stable: those wanted come first, in their order.
        columns = wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        columns = columns[:, :num_first]
        chosen = wanted.gather(1, columns)
        complete = columns.shape[1] == num_first and bool(chosen.all())
        return FirstTokens(columns, positions.gather(1, columns).where(chosen, -1), complete)


def kept_keys(key: Tensor) -> KeptKeys | None:
    """What a window cache left on the keys it returned; None for keys of other origin."""
    return getattr(key, _ATTRIBUTE, None)


def _cut(held: Tensor, slots: int, dropped: int) -> Tensor:
    """Without the first ``dropped`` columns after the slots."""
    rest = held[:, :, slots + dropped :]
    if slots:
        return torch.cat([held[:, :, :slots], rest], 2)
    # A view would keep a long prompt in memory until the next token.
    return rest if dropped * 4 < held.shape[2] else rest.clone()


def _gather(held: Tensor, order: Tensor, width: int) -> Tensor:
    """Columns ``order`` (per row) of the first ``width``, and all after these."""
    index = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    return torch.cat([held[:, :, :width].gather(2, index), held[:, :, width:]], 2)
