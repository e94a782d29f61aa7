"""A user's own classes around transformers' models take our names, and others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.user_attention import BypassingLlama
from integrations.user_models import BertRegression, OwnLlama, RewardModel
from tiny import random_ids
from transformers import BertConfig, LlamaConfig

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=32, initializer_range=0.5)  # fmt: skip
LLAMA, BERT = LlamaConfig(**SIZES), BertConfig(**SIZES, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize(
    ("cls", "config"), [(OwnLlama, LLAMA), (RewardModel, LLAMA), (BertRegression, BERT)]
)
def test_classes_around_transformers_models(cls: Any, config: Any) -> None:
    ours = cls._from_config(config, attn_implementation="flash").eval()
    eager = cls._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(ours.state_dict())
    later = cls(config).eval()
    later.load_state_dict(ours.state_dict())
    later.set_attn_implementation("flash")
    ids = random_ids(2, 9)
    with torch.no_grad():
        found, expected = (m(ids) for m in (ours, eager))
        again = later(ids)
    found, expected, again = (
        x if isinstance(x, torch.Tensor) else x.logits for x in (found, expected, again)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, found)


def test_attention_of_their_own_is_refused() -> None:
    with pytest.raises(ValueError, match="BypassingLlama computes attention by itself"):
        BypassingLlama._from_config(LLAMA, attn_implementation="flash")
