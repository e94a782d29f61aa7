"""How much of the KV cache an evaluation read."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class KVReads:
    """Counted reads of the KV cache, over all layers and decoding steps.

    Attributes:
        decode_steps: Decoding steps, each of one token for a whole batch.
        kv_bytes_read: Bytes of keys and values that were read.
        kv_bytes_dense: Bytes that dense attention would have read in the same steps.
    """

    decode_steps: int = 0
    kv_bytes_read: int = 0
    kv_bytes_dense: int = 0

    def __add__(self, other: KVReads) -> KVReads:
        return KVReads(
            self.decode_steps + other.decode_steps,
            self.kv_bytes_read + other.kv_bytes_read,
            self.kv_bytes_dense + other.kv_bytes_dense,
        )

    @property
    def fraction(self) -> float | None:
        """Bytes read by bytes that dense attention reads; None when nothing was decoded."""
        return self.kv_bytes_read / self.kv_bytes_dense if self.kv_bytes_dense else None

    def to_dict(self) -> dict[str, int]:
        """The numbers as plain JSON values."""
        return dataclasses.asdict(self)
