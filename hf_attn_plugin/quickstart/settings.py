"""Every number of the quickstart in one place."""

from __future__ import annotations

import dataclasses

from hf_attn_plugin.config import LongformerConfig, SlidingWindowConfig, SparQConfig
from hf_attn_plugin.lm_eval.needle import NeedleTemplate

_VALUES = """
amber azure beige bronze coral crimson ebony gold gray green indigo ivory jade khaki lilac lime
maroon mauve navy ochre olive orchid peach pearl pink plum purple red ruby russet rust sage sand
sapphire scarlet sepia sienna slate steel tan taupe teal topaz umber violet white yellow zinc
"""

TEMPLATE = NeedleTemplate(
    needle="\nThe secret word of {key} is {value}.\n",
    question="\nThe secret word of {key} is",
    values=tuple(_VALUES.split()),
)
"""The needle that the model learns to find; its value is a word, one token."""


@dataclasses.dataclass(frozen=True)
class QuickstartSettings:
    """Sizes, steps and learning rates; the defaults are what `hf-attn quickstart` runs.

    Attributes:
        vocab_size: Tokens of the tokenizer that is trained on the text.
        hidden_size: Width of the model.
        intermediate_size: Width of its feed-forward layers.
        num_layers: Layers; retrieval needs two, one to look back and one to copy.
        num_heads: Query heads, and key/value heads before the conversion.
        num_key_value_heads: Key/value heads after the conversion.
        initializer_range: Standard deviation of the initial weights. Transformers' default of 0.02
            makes the attention of so narrow a model uniform, and it learns no retrieval in minutes.
        bias_range: Standard deviation of the initial biases of queries and keys: with rotary
            positions they make heads that look a fixed number of tokens back, which retrieval
            builds upon, from the start.
        first_length: Tokens of the first training sequences; they double up to `context`.
        context: Context that the model is pretrained with.
        extension: The context is extended to this many times `context`.
        tokens_per_step: Tokens of every training step, in all stages.
        advance_accuracy: The sequences double when this share of the answers is right.
        fact_shares: Share of the tokens in facts and questions while the sequences grow, in the
            rest of the first half of the pretraining, in its second half, and afterwards.
        pretrain_steps: Steps of the pretraining.
        finetune_steps: Steps of the fine-tuning at the long context.
        uptrain_fraction: Steps after the conversion, as a share of all steps before it.
        pretrain_lr: Peak learning rate of the pretraining.
        finetune_lr: Peak learning rate of the LoRA fine-tuning.
        uptrain_lr: Peak learning rate after the conversion.
        lora_rank: Rank of the LoRA matrices.
        window: Window of the sparse methods, tokens.
        global_tokens: Global tokens of `longformer`; a needle at depth 0 lies within.
        save_steps: Training steps between two checkpoints.
        held_out_rows: Rows of held-out text on which the losses are measured.
        lengths: Context lengths of the needle test, tokens.
        depths: Depths of the needle test.
        samples: Needles per length and depth.
        bpb_samples: Pieces of text for bits per byte.
        bpb_scored: Tokens scored in each.
        batch_size: Prompts evaluated at once.
    """

    vocab_size: int = 768
    hidden_size: int = 96
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_key_value_heads: int = 2
    initializer_range: float = 0.1
    bias_range: float = 1.0
    first_length: int = 32
    context: int = 128
    extension: int = 4
    tokens_per_step: int = 2048
    advance_accuracy: float = 0.5
    fact_shares: tuple[float, float, float, float] = (0.8, 0.5, 0.3, 0.4)
    pretrain_steps: int = 1500
    finetune_steps: int = 200
    uptrain_fraction: float = 0.05
    pretrain_lr: float = 5e-3
    finetune_lr: float = 4e-3
    uptrain_lr: float = 3e-3
    lora_rank: int = 16
    window: int = 160
    global_tokens: int = 32
    save_steps: int = 100
    held_out_rows: int = 16
    lengths: tuple[int, ...] = (128, 256, 384, 512)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 10
    bpb_samples: int = 16
    bpb_scored: int = 32
    batch_size: int = 25

    @property
    def long_context(self) -> int:
        """Context after the extension, tokens."""
        return self.context * self.extension

    @property
    def uptrain_steps(self) -> int:
        """Steps after the conversion."""
        return max(1, int(self.uptrain_fraction * (self.pretrain_steps + self.finetune_steps)))

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def longformer(self) -> LongformerConfig:
        """What the model is fine-tuned with."""
        return LongformerConfig(window=self.window, num_global_tokens=self.global_tokens)

    @property
    def sliding_window(self) -> SlidingWindowConfig:
        """A window and nothing else."""
        return SlidingWindowConfig(window=self.window)

    def sparq(self, ratio: float) -> SparQConfig:
        """SparQ that reads this share of the KV cache, on average over `lengths`.

        A step over S keys reads r of d components of each and k keys and values whole:
        r / 2d + k / S of the cache. Both terms get half of the ratio.

        Args:
            ratio: Share of the cache's bytes, 0 to 1.
        """
        rank = max(1, round(ratio * self.head_dim))
        top_k = max(1, round(ratio / 2 * sum(self.lengths) / len(self.lengths)))
        return SparQConfig(rank=rank, top_k=top_k)
