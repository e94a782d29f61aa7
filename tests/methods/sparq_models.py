"""Tiny models for the tests of ``sparq``, and its paper as an attention implementation."""

from __future__ import annotations

import contextlib
import math

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import sdpa_mask

import hf_attn_plugin
from hf_attn_plugin import SparQConfig
from hf_attn_plugin.ops.sparq import key_copy
from hf_attn_plugin.ops.sparq.key_copy import BITS
from tests.ops.sparq_reference import numpy_sparq, quantized_copy

# The default initializer_range would make attention all but uniform, and wrong masks invisible.
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "mistral": (MistralForCausalLM, MistralConfig, SIZES | {"sliding_window": None}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, SIZES | MIXED | {"query_pre_attn_scalar": 3}),
    "gemma2": (
        Gemma2ForCausalLM, Gemma2Config,
        SIZES | MIXED | {"query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0},
    ),
    "gpt_oss": (
        GptOssForCausalLM, GptOssConfig,
        SIZES | MIXED | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gpt2": (
        GPT2LMHeadModel, GPT2Config,
        {
            "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        },
    ),
}  # fmt: skip
WINDOWED = (MistralForCausalLM, MistralConfig, SIZES | {"sliding_window": 6})
EVERYTHING = SparQConfig(rank=2, top_k=1000)
FEW = SparQConfig(rank=3, top_k=5, local_window=2)
FEW_AND_MEAN = SparQConfig(rank=3, top_k=5, local_window=2, mean_value_reallocation=True)


def build(model, attn_implementation, parameters=None, dtype=torch.float64):
    """The same weights for every attn_implementation.

    In float64 the choice of keys does not hang on rounding; eager needs float32, since its float64
    masks become NaN in rows of padding.
    """
    model_class, config_class, sizes = MODELS[model] if isinstance(model, str) else model
    torch.manual_seed(0)
    made = model_class._from_config(
        config_class(**sizes), attn_implementation=attn_implementation, dtype=dtype,
        experts_implementation="eager",
    ).eval()  # fmt: skip
    for name, parameter in made.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return made if parameters is None else hf_attn_plugin.configure(made, parameters)


def prompt(batch=2, length=17, seed=1):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **kwargs):
    """Tokens and the logits they were chosen from."""
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    # The padding token's embedding is zero: so is then a query, to which all keys are equal.
    kwargs.setdefault("suppress_tokens", [0])
    output = model.generate(
        ids, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **kwargs,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, dim=1)


def same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    # Norms, rotary embeddings and these logits are float32 even in float64 models.
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-4)
    assert one[1].isfinite().all()


def padded_prompt():
    ids = prompt(3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 9)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


@contextlib.contextmanager
def paper_attention(used=None):
    """Registers "paper", attention that decodes by the numpy transcription of the paper.

    ``used`` is a list that gets (components, keys, cached positions) of every row.
    """

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        seen = attention_mask
        s_aux, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
        if query.shape[2] == 1 and kwargs.get("sliding_window") is None:
            parameters = SparQConfig(**module.config.attn_params["sparq"])
            visible, copied = seen[:, 0, 0], None
            if parameters.key_copy in BITS:
                filled = int(visible.any(0).nonzero().max()) + 1  # static caches have room left
                copied = quantized_copy(key, BITS[parameters.key_copy], key_copy.GROUP, filled)
            rows = []
            output = numpy_sparq(
                query, key, value, rank=parameters.rank, top_k=parameters.top_k,
                local_window=parameters.local_window,
                reallocate=parameters.mean_value_reallocation,
                scaling=scaling, visible=visible, sinks=s_aux, softcap=softcap,
                coverage=parameters.coverage, rank_coverage=parameters.rank_coverage,
                mean_block=parameters.mean_block, copied=copied, used=rows,
            )  # fmt: skip
            if used is not None:
                used.extend((r, k, key.shape[2]) for r, k in rows)
        else:
            group = query.shape[1] // key.shape[1]
            scores = query @ key.repeat_interleave(group, 1).mT
            scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, -math.inf)
            if s_aux is not None:
                sink = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, sink], dim=-1)
            weights = scores.softmax(-1).nan_to_num()[..., : key.shape[2]]
            output = weights @ value.repeat_interleave(group, 1)
        return output.transpose(1, 2).contiguous(), None

    def mask(**kwargs):
        return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})

    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    for registry, function in zip(registries, (attend, mask), strict=True):
        registry["paper"] = function
    try:
        yield
    finally:
        for registry in registries:
            del registry["paper"]
