"""What goes wrong on ranks, each said by every rank that lives to say it."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import hf_attn_plugin
from tests.sequence_parallelism.cases import Case, make_batch, make_model
from tests.tiny import random_ids, tiny_model

SOON = datetime.timedelta(seconds=5)
LLAMA = Case("llama", "llama")


def _llama(**changes: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    return make_model(LLAMA, "ring"), {**make_batch("plain", "llama"), **changes}, {}


def shapes(rank: int) -> Any:
    return _llama(input_ids=random_ids(2, 50 + rank), labels=random_ids(2, 50 + rank))


def dtypes(rank: int) -> Any:
    return _llama(attention_mask=torch.ones(2, 50, dtype=torch.int32 if rank else torch.int64))


def contents(rank: int) -> Any:
    return _llama(input_ids=random_ids(2, 50, seed=rank))


def embeddings(rank: int) -> Any:
    """One number of one token differs."""
    made = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 50, 32, generator=made)
    embeds[1, 7, 5] += rank * 1e-3
    return make_model(LLAMA, "ring"), {"inputs_embeds": embeds}, {}


def permuted_embeddings(rank: int) -> Any:
    embeds = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    embeds = embeds.flip(-1) if rank else embeds
    return make_model(LLAMA, "ring"), {"inputs_embeds": embeds}, {}


def halves(rank: int) -> Any:
    model, batch, more = _llama()
    return model.to(torch.float16 if rank else torch.bfloat16), batch, more


def trained(rank: int) -> Any:
    model, batch, more = _llama()
    model.model.layers[0].self_attn.v_proj.requires_grad_(rank == 0)
    return model, batch, more


def settings(rank: int) -> Any:
    return (*_llama()[:2], {"schedule": ("ring", "gather")[rank]})


def names(rank: int) -> Any:
    return make_model(LLAMA, ("ring", "flash")[rank]), make_batch("plain", "llama"), {}


def an_error_on_one(rank: int) -> Any:
    return _llama(**({"pixel_values": torch.zeros(1)} if rank else {}))


def a_bug_on_one(rank: int) -> Any:
    model, batch, options = _llama()
    if rank:
        model.forward = None
    return model, batch, options


def own_mask(rank: int) -> Any:
    return _llama(attention_mask=torch.ones(2, 1, 50, 50))


def a_cache(rank: int) -> Any:
    return _llama(use_cache=True)


def weights(rank: int) -> Any:
    return _llama(output_attentions=True)


def router(rank: int) -> Any:
    return _llama(output_router_logits=True)


def unknown_schedule(rank: int) -> Any:
    return (*_llama()[:2], {"schedule": "rings"})


def heads(rank: int) -> Any:
    shape = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    model = tiny_model("llama", "ring", **shape)
    return model, make_batch("plain", "llama"), {"schedule": "ulysses"}


def sdpa(rank: int) -> Any:
    return tiny_model("llama", "sdpa"), make_batch("plain", "llama"), {}


def decoding(rank: int) -> Any:
    return tiny_model("llama", "sparq"), make_batch("plain", "llama"), {}


def no_model(rank: int) -> Any:
    return nn.Linear(2, 2), make_batch("plain", "llama"), {}


def compiled(rank: int) -> Any:
    model, batch, options = _llama()
    model.compile()
    return model, batch, options


def compiled_around(rank: int) -> Any:
    model, batch, options = _llama()
    return torch.compile(model), batch, options


def recurrent(rank: int) -> Any:
    kinds = ["conv", "full_attention"]
    model = tiny_model("lfm2", "ring", layer_types=kinds, num_key_value_heads=2)
    return model, make_batch("plain", "llama"), {}


class _OwnAttention(nn.Module):
    """Attends to all earlier tokens alike, and asks transformers for nothing."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        count = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states.cumsum(1) / count, None


def one_attention_of_two(rank: int) -> Any:
    """A layer that passes transformers' interface by, behind one that does not."""
    model, batch, options = _llama()
    model.model.layers[1].self_attn = _OwnAttention()
    return model, batch, options


class _Shifted(nn.Module):
    """Mixes each token with the one before it, as RWKV does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shifted = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return self.inner(0.5 * hidden + 0.5 * shifted)


def token_shift(rank: int) -> Any:
    model, batch, options = _llama()
    model.model.layers[1].mlp = _Shifted(model.model.layers[1].mlp)
    return model, batch, options


def own_positions(rank: int) -> Any:
    """A model that numbers the tokens of a call whatever it is told."""
    model, batch, options = _llama()
    forward = model.model.rotary_emb.forward

    def counted(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return forward(x, torch.arange(x.shape[1])[None])

    model.model.rotary_emb.forward = counted
    return model, batch, options


def one_per_row(rank: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = tiny_model("llama").config
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="ring")
    return model.eval(), {"input_ids": random_ids(2, 50)}, {}


def twice(rank: int) -> Any:
    model, batch, options = _llama()
    hf_attn_plugin.sequence_parallel(None, model, batch).__enter__()
    return model, batch, options


def late(rank: int) -> Any:
    if rank == 1:
        time.sleep(3)
    return (*_llama()[:2], {"timeout": datetime.timedelta(seconds=1)})


REFUSED: dict[Callable[[int], Any], str] = {
    shapes: r"same whole batch.*shape of input_ids is \['torch.int64', 2, 50\] on rank 0 and .*51\]"
    r" on rank 1 of 2",
    dtypes: r"shape of attention_mask .*int64.*on rank 0 and .*int32.* on rank 1",
    contents: r"content of input_ids \(a checksum\) is \d+ on rank 0 and \d+ on rank 1",
    embeddings: r"content of inputs_embeds \(a checksum\) is -?\d+ on rank 0 and -?\d+ on rank 1",
    permuted_embeddings: r"content of inputs_embeds \(a checksum\) is -?\d+ on rank 0",
    halves: r"model's dtype is torch.bfloat16 on rank 0 and torch.float16 on rank 1",
    trained: r"what is trained \(a checksum of the names\) is \d+ on rank 0 and \d+ on rank 1",
    settings: r"schedule is ring on rank 0 and gather on rank 1",
    names: r"ring None on rank 0 and .* flash None on rank 1",
    an_error_on_one: r"refused on rank 1 of 2: .*'pixel_values'.*The batch may hold input_ids",
    a_bug_on_one: r"refused on rank 1 of 2: TypeError",
    own_mask: r"every rank.*attention_mask must be \[2, 50\].*for every pair cannot be spread",
    a_cache: "use_cache=True is not possible",
    weights: "output_attentions=True is not possible",
    router: "output_router_logits=True is not possible: the experts' balance",
    unknown_schedule: "schedule must be one of .*'ring'.*got 'rings'",
    heads: "3 heads do not divide among 2 ranks",
    sdpa: "attn_implementation='sdpa', which does not run .*set_attn_implementation\\('ring'\\)",
    decoding: "attn_implementation='sparq', which does not run over a sequence that is spread",
    no_model: "takes a transformers model; there is none in a Linear",
    compiled: "is compiled",
    compiled_around: "is compiled",
    recurrent: "'conv' layers, whose state goes from token to token",
    one_attention_of_two: "depends on more than attention through transformers' interface",
    token_shift: "depends on more than attention through transformers' interface",
    own_positions: "depends on more than attention through transformers' interface",
    one_per_row: "returns no logits or last_hidden_state for every token",
    twice: "inside another sequence_parallel block",
    late: "rank 1 of 2 did not get here within 1 s",
}


def known_to_one(rank: int) -> torch.Tensor:
    """Spread by two ranks, after one of them had the model to itself."""
    groups = [torch.distributed.new_group([each]) for each in range(2)]
    model, batch, options = _llama()
    options["timeout"] = SOON
    if rank == 0:
        with hf_attn_plugin.sequence_parallel(groups[0], model, batch, **options) as shard:
            model(**shard.batch)
    with hf_attn_plugin.sequence_parallel(None, model, batch, **options) as shard:
        return shard.gather(model(**shard.batch).logits)


def other_loss_on_one(rank: int) -> str:
    """A loss function is replaced, by one of two ranks, after a block."""
    model, batch, options = _llama()
    with hf_attn_plugin.sequence_parallel(None, model, batch, **options):
        pass
    if rank:
        model.loss_function = lambda logits, **kwargs: logits.mean()
    return refused(model, batch, {"timeout": SOON})


def refused(model: Any, batch: dict[str, Any], options: dict[str, Any]) -> str:
    """What is said against it."""
    try:
        hf_attn_plugin.sequence_parallel(None, model, batch, **{"timeout": SOON, **options})
    except (ValueError, TimeoutError) as error:
        return str(error)
    return "nothing"


def refuse(rank: int, names: list[str]) -> dict[str, str]:
    """What each of these says on this rank."""
    return {name: refused(*globals()[name](rank)) for name in names}
