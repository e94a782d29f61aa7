"""Models as users write them, around transformers' own and with attention of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BertModel, BertPreTrainedModel, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel


class OwnLlama(LlamaForCausalLM):
    """A subclass that changes nothing."""


class AttentionPool(nn.Module):
    """A weighted mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden * self.weight(hidden).softmax(1)).sum(1)


class RewardModel(LlamaPreTrainedModel):
    """A head on a model of transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.pool = AttentionPool(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return self.pool(self.model(input_ids, **kwargs).last_hidden_state)


class BertRegression(BertPreTrainedModel):
    """A head on an encoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return self.bert(input_ids, **kwargs).last_hidden_state[:, 0]
