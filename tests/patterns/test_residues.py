"""Strided patterns in two parts: together they are the pattern, and no pair is in both."""

import random

import pytest
import torch

from hf_attn_plugin.patterns import Pattern
from hf_attn_plugin.patterns.residues import StridedParts, split_stride
from tests.ops.test_attention_property import random_spec, to_pattern


def far_mask(parts: StridedParts, pattern: Pattern) -> torch.Tensor:
    """The far part in the order of the sequence, told the same from either side."""
    by_query = parts.queries.visible(pattern.kv_len)
    by_key = parts.keys.visible(pattern.q_len).mT
    by_query, by_key = torch.broadcast_tensors(by_query, by_key)
    assert torch.equal(by_query, by_key)
    mask = torch.empty_like(by_query)
    index = torch.arange(len(mask))[:, None, None]
    mask[index, parts.query_order[None, :, None], parts.key_order[None, None]] = by_query
    return mask


@pytest.mark.parametrize("seed", range(8))
def test_parts_are_the_pattern(seed: int) -> None:
    rng, found = random.Random(seed), 0
    torch.manual_seed(seed)
    for _ in range(150):
        kv_len = rng.choice([1, 7, 40, 90])
        q_len = rng.randint(1, kv_len)
        spec = random_spec(rng, 2, q_len, kv_len) | {"stride": rng.choice([1, 2, 3, 8, 40])}
        pattern = to_pattern(spec, q_len, kv_len)
        parts = split_stride(pattern, "cpu")
        if parts is None:
            continue
        found += 1
        near, far = parts.near.visible("cpu")[:, 0], far_mask(parts, pattern)
        assert not (near & far).any(), spec
        assert torch.equal(near | far, pattern.visible("cpu")[:, 0] | (near & False)), spec
    assert found > 30


def test_far_pairs_are_where_they_should_be() -> None:
    pattern = Pattern(q_len=12, kv_len=12, stride=4, window=2)
    parts = split_stride(pattern, "cpu")
    assert parts is not None
    assert far_mask(parts, pattern)[0].nonzero().tolist() == [
        [i, j] for i in range(12) for j in range(12) if i - j in (4, 8)
    ]
    assert parts.query_order.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_without_stride_there_are_no_parts() -> None:
    assert split_stride(Pattern(q_len=4, kv_len=4, window=2), "cpu") is None
