"""Sequences that several GPUs share: `sequence_parallel`."""

from __future__ import annotations

from typing import Any

import torch
from tiny import random_ids, tiny_model

import hf_attn_plugin

from .case import Case

AREA = "Sequences over several GPUs"


def shared(attn: str = "ring", family: str = "llama", where: Any = None, **changes: Any) -> Any:
    """A batch of two rows of 8 tokens, with changes; those of options go there."""
    options = {name: changes.pop(name) for name in ("schedule", "layout") if name in changes}
    model = tiny_model(family, attn, **changes.pop("config", {}))
    batch = {"input_ids": random_ids(2, 8), **changes}
    return hf_attn_plugin.sequence_parallel(where, model, batch, **options)


def nested() -> Any:
    model = tiny_model("llama", "ring")
    batch = {"input_ids": random_ids(2, 8)}
    with hf_attn_plugin.sequence_parallel(None, model, batch):
        hf_attn_plugin.sequence_parallel(None, model, batch)


def forgotten() -> Any:
    model = tiny_model("llama", "ring").train()
    model.gradient_checkpointing_enable()
    ids = random_ids(1, 8)
    with hf_attn_plugin.sequence_parallel(None, model, {"input_ids": ids, "labels": ids}) as shard:
        output = model(**shard.batch)
    output.loss.backward()


LENGTHS = torch.tensor([0, 5])
RECURRENT = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}

CASES = (
    Case(AREA, 'a model with "ring", called outside of sequence_parallel',
         lambda f: tiny_model("llama", "ring")(random_ids(1, 8)),
         ("'ring'", "outside of hf_attn_plugin.sequence_parallel"),
         ("forward and backward inside", "set_attn_implementation('flash')")),
    Case(AREA, 'sequence_parallel("cuda", model, batch)', lambda f: shared(where="cuda"),
         ("got a str",), ("an Accelerator, a DeviceMesh, a ProcessGroup",)),
    Case(AREA, 'sequence_parallel of a model with "sdpa"', lambda f: shared("sdpa"),
         ("'sdpa'",), ("set_attn_implementation('ring')",)),
    Case(AREA, 'sequence_parallel of a model with "sparq"', lambda f: shared("sparq"),
         ("'sparq'",), ("'ring'",)),
    Case(AREA, 'sequence_parallel(..., schedule="rings")', lambda f: shared(schedule="rings"),
         ("'rings'",), ("'gather', 'ring', 'ulysses'",)),
    Case(AREA, 'sequence_parallel(..., layout="striped")', lambda f: shared(layout="striped"),
         ("'striped'",), ("'contiguous', 'zigzag'",)),
    Case(AREA, "sequence_parallel of a 4D attention_mask",
         lambda f: shared(attention_mask=torch.ones(2, 1, 8, 8)),
         ("attention_mask", "(2, 1, 8, 8)"), ("must be [2, 8]",)),
    Case(AREA, "sequence_parallel of pixel_values", lambda f: shared(pixel_values=LENGTHS),
         ("'pixel_values'",), ("The batch may hold input_ids",)),
    Case(AREA, "sequence_parallel of use_cache=True", lambda f: shared(use_cache=True),
         ("use_cache=True",), ("no cache holds them",)),
    Case(AREA, "sequence_parallel of cu_seq_lens_q and two rows",
         lambda f: shared(cu_seq_lens_q=LENGTHS, cu_seq_lens_k=LENGTHS),
         ("[0, 5]", "2 rows"), ("in one batch row",)),
    Case(AREA, "sequence_parallel of a model with convolutions (LFM2)",
         lambda f: shared(family="lfm2", config=RECURRENT),
         ("Lfm2ForCausalLM", "'conv'"), ("attention layers alone",)),
    Case(AREA, "sequence_parallel inside sequence_parallel", lambda f: nested(),
         ("inside another sequence_parallel block",), ("Leave that one first",)),
    Case(AREA, "backward() after the block, with gradient checkpointing", lambda f: forgotten(),
         ("backward pass has not run",), ("backward() inside the block",)),
)  # fmt: skip
