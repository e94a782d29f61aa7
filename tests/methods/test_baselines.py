"""``exact_topk``, ``h2o`` and ``lm_infinite`` in models, against a slow and separate recomputation.

The recomputation is written per sequence, head and query, in numpy, straight from the papers. It is
registered with transformers as an attention implementation of its own.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Float64, padding_mask, random_ids, tiny_config, tiny_model, twin
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask

from hf_attn_plugin import (
    ExactTopKConfig,
    H2OConfig,
    LMInfiniteConfig,
    configure,
    count_reads,
)
from tests.methods.sparq_models import same

FAMILIES = ["llama", "gemma2", "gpt_oss", "gpt2"]
FEW = {
    "exact_topk": ExactTopKConfig(top_k=4, local_window=1),
    "h2o": H2OConfig(top_k=6, local_window=2),
    "lm_infinite": LMInfiniteConfig(window=4, num_sink_tokens=2),
}
ALL = {
    "exact_topk": ExactTopKConfig(top_k=1000),
    "h2o": H2OConfig(top_k=1000),
    "lm_infinite": LMInfiniteConfig(window=1000),
}
METHODS = list(FEW)
PADS = [0, 3, 9]
LENGTH = 17
STEPS = 7
KINDS = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


class Slow:
    """One model's decoding by loops; what H2O remembers is kept here, by layer, row and head."""

    def __init__(self, parameters: Any, comeback: bool = False) -> None:
        self.parameters = parameters
        self.comeback = comeback  # the control: an H2O whose dropped keys go on drawing
        self.kept: dict[Any, set[int]] = defaultdict(set)
        self.drawn: dict[Any, dict[int, float]] = defaultdict(lambda: defaultdict(float))

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        q, k, v = (t.detach().double().numpy() for t in (query, key, value))
        batch, heads, q_len, width = q.shape
        kv_heads, kv_len = k.shape[1:3]
        seen = attention_mask.expand(batch, 1, -1, -1)[:, 0].numpy()
        scale = width**-0.5 if scaling is None else scaling
        sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
        sparse = kwargs.get("sliding_window") is None
        output = np.zeros((batch, heads, q_len, v.shape[-1]))
        group = heads // kv_heads
        for b, h, i in itertools.product(range(batch), range(kv_heads), range(q_len)):
            visible = [j for j in range(kv_len) if seen[b, i, j]]
            group_heads = range(h * group, (h + 1) * group)

            def weights_of(g, keys, b=b, h=h, i=i):
                scores = [scale * float(q[b, g, i] @ k[b, h, j]) for j in keys]
                if softcap is not None:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                extra = [] if sinks is None else [float(sinks[g])]
                top = max(scores + extra, default=0.0)
                total = sum(math.exp(s - top) for s in scores + extra)
                return {j: math.exp(s - top) / total for j, s in zip(keys, scores, strict=True)}

            place = (module.layer_idx, b, h)
            own = kv_len - q_len + i
            everything = visible
            if sparse and visible:
                visible = self.choose(
                    place, visible, own, q_len, lambda g, keys, w=weights_of: w(g, keys),
                    group_heads,
                )  # fmt: skip
            for g in group_heads:
                weights = weights_of(g, visible)
                output[b, g, i] = sum((w * v[b, h, j] for j, w in weights.items()), 0.0)
                # Queries that are padding themselves draw nothing.
                if own in visible:
                    counted = weights_of(g, everything) if self.comeback else weights
                    for j, w in counted.items():
                        self.drawn[place][j] += w
        made = torch.from_numpy(output).to(query.dtype)
        return made.transpose(1, 2).contiguous(), None

    def choose(self, place, visible, own, q_len, weights_of, group_heads) -> list[int]:
        parameters = self.parameters
        if isinstance(parameters, LMInfiniteConfig):
            if q_len > 1:
                return visible
            first = visible[: parameters.num_sink_tokens]
            return sorted({*first, *visible[-parameters.window :]})
        if isinstance(parameters, ExactTopKConfig):
            if q_len > 1:
                return visible
            mass = defaultdict(float)
            for g in group_heads:
                for j, w in weights_of(g, visible).items():
                    mass[j] += w
            best = sorted(visible, key=lambda j: -mass[j])
            local = visible[len(visible) - parameters.local_window :]
            rest = [j for j in best if j not in local]
            return sorted([*local, *rest[: parameters.top_k - len(local)]])
        kept = self.kept[place]
        if own in visible:
            kept.add(own)
        if q_len == 1:
            pool = visible if self.comeback else [j for j in visible if j in kept]
            local = pool[len(pool) - parameters.local_window :]
            rest = sorted((j for j in pool if j not in local), key=lambda j: -self.drawn[place][j])
            kept.clear()
            kept.update(local, rest[: parameters.top_k - len(local)])
        return [j for j in visible if j in kept]


@pytest.fixture
def slowly(monkeypatch):
    """Makes a copy of a model that decodes by the recomputation."""
    numbers = itertools.count()

    def mask(**kwargs):
        return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})

    def make(model, parameters, comeback=False):
        name = f"slow{next(numbers)}"
        slow = Slow(parameters, comeback)
        monkeypatch.setitem(AttentionInterface._global_mapping, name, slow)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, mask)
        return twin(model, name)

    return make


def build(family):
    """A model in float64, so that the choice of keys does not hang on rounding."""
    return tiny_model(family, initializer_range=0.6, **KINDS.get(family, {})).double()


def ours(model, parameters):
    made = twin(model, parameters.name)
    return configure(made, parameters)


def prompt():
    mask = padding_mask(LENGTH, PADS, "left")
    return random_ids(len(PADS), LENGTH) * mask, mask


def generate(model, ids, mask, **kwargs):
    """Tokens, and the logits they were chosen from."""
    model.generation_config.eos_token_id = None
    # The padding token's embedding is 0: it would attend evenly, and every choice be a tie.
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, suppress_tokens=[0],
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_follows_the_recomputation(family, method, slowly):
    model = build(family)
    expected = generate(slowly(model, FEW[method]), *prompt())
    same(generate(ours(model, FEW[method]), *prompt()), expected)
    dense = generate(twin(model, "flash"), *prompt())
    # Step 0 is the prefill, exact in any case; afterwards so few keys must show.
    torch.testing.assert_close(expected[1][:, 0], dense[1][:, 0], rtol=1e-4, atol=1e-4)
    assert (expected[1][:, 1] - dense[1][:, 1]).abs().max() > 2e-3


@pytest.mark.parametrize("method", ["exact_topk", "lm_infinite"])
def test_static_caches(method):
    model = ours(build("llama"), FEW[method])
    same(generate(model, *prompt(), cache_implementation="static"), generate(model, *prompt()))


@pytest.mark.parametrize("method", ["exact_topk", "lm_infinite"])
def test_compiled_decoding_over_a_static_cache(method):
    ids, mask = prompt()
    model = ours(build("llama"), FEW[method])
    expected = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    same(generate(model, ids, mask, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_key_equals_eager(family, method):
    model = tiny_model(family, **KINDS.get(family, {}))
    same(generate(ours(model, ALL[method]), *prompt()), generate(model, *prompt()))


@pytest.mark.parametrize("method", METHODS)
def test_left_padding_changes_nothing(method):
    model = ours(build("llama"), FEW[method])
    ids, mask = prompt()
    together = generate(model, ids, mask)
    for row, pad in enumerate(PADS):
        alone = generate(model, ids[row : row + 1, pad:], mask[row : row + 1, pad:])
        same((together[0][row : row + 1, pad:], together[1][row : row + 1]), alone)


@pytest.mark.parametrize("method", METHODS)
def test_reordered_rows_go_on_as_their_own(method):
    model = ours(build("llama"), FEW[method])
    ids, order = random_ids(3, 14), torch.tensor([2, 0, 2])

    @torch.no_grad()
    def logits(ids, reorder_at=None):
        cache, found = None, []
        for step, part in enumerate([ids[:, :10], *ids[:, 10:].split(1, dim=1)]):
            if step == reorder_at:
                cache.reorder_cache(order)
                part = part[order]
            elif reorder_at is not None and step > reorder_at:
                part = part[order]
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1])
        return found

    plain, reordered = logits(ids), logits(ids, reorder_at=3)
    for step in (3, 4):
        torch.testing.assert_close(reordered[step], plain[step][order])
        assert (reordered[step] - plain[step]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_beams(method):
    model = tiny_model("llama")
    same_beams = [
        m.generate(random_ids(2, 9), num_beams=3, max_new_tokens=6, do_sample=False)
        for m in (model, ours(model, ALL[method]))
    ]
    assert torch.equal(*same_beams)
    few = ours(model, FEW[method])
    assert few.generate(random_ids(2, 9), num_beams=3, max_new_tokens=6).shape[0] == 2


def turns(model, ids, mask, splits):
    """The logits of feeding ``ids`` in pieces, to one cache."""
    found, cache, start = [], None, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for piece in splits:
            stop = start + piece
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                position_ids=positions[:, start:stop], use_cache=True,
            )  # fmt: skip
            cache, start = out.past_key_values, stop
            found.append(out.logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("splits", [[8, 6, 1, 1, 1], [9, 1, 1, 5, 1]], ids=["chunks", "two turns"])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_in_pieces(method, splits, slowly):
    model = build("llama")
    ids, mask = prompt()
    mask[2, 12:14] = 0  # and a hole, as right padding leaves it in the middle of a conversation
    expected = turns(slowly(model, FEW[method]), ids, mask, splits)
    torch.testing.assert_close(
        turns(ours(model, FEW[method]), ids, mask, splits), expected, rtol=1e-4, atol=1e-4
    )


def test_what_h2o_dropped_never_comes_back(slowly):
    model = build("llama")
    found = generate(ours(model, FEW["h2o"]), *prompt())
    same(found, generate(slowly(model, FEW["h2o"]), *prompt()))
    wrong = generate(slowly(model, FEW["h2o"], comeback=True), *prompt())
    assert (found[1] - wrong[1]).abs().max() > 1e-2


def test_h2o_counts_the_prompt_in_blocks(monkeypatch):
    model = ours(build("llama"), FEW["h2o"])
    whole = generate(model, *prompt())
    monkeypatch.setattr("hf_attn_plugin.ops.h2o._BLOCK_BYTES", 1)  # one query at a time
    same(generate(model, *prompt()), whole)


@pytest.mark.parametrize("method", METHODS)
def test_reads_are_what_is_gathered(method):
    model = ours(tiny_model("llama"), FEW[method])
    batch, kv_heads, width, layers = 2, 2, 8, 2
    with count_reads(model) as reads:
        generate(model, random_ids(batch, LENGTH), torch.ones(batch, LENGTH, dtype=torch.long))
    lengths = range(LENGTH + 1, LENGTH + STEPS)
    row = batch * kv_heads * width * 4 * layers
    assert reads.kv_bytes_dense == 2 * row * sum(lengths)
    expected = {
        "exact_topk": row * sum(n + 4 for n in lengths),
        "h2o": 2 * row * 6 * len(lengths),
        "lm_infinite": 2 * row * (4 + 2) * len(lengths),
    }
    assert reads.kv_bytes_read == expected[method]
    assert reads.decode_steps == STEPS - 1


@pytest.mark.parametrize("method", METHODS)
def test_training_is_dense(method):
    model = tiny_model("llama").train()
    gradients = []
    for made in (model, ours(model, FEW[method])):
        made.zero_grad()
        made(random_ids(2, LENGTH)).logits.sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_decoding_has_gradients(method, slowly):
    """Of a step over a cache: against finite differences of the recomputation."""
    model = build("llama")
    ids = random_ids(1, LENGTH)

    def last(made):
        with torch.no_grad():
            cache = made(ids[:, :-1], use_cache=True).past_key_values
        return made(ids[:, -1:], past_key_values=cache).logits.sum()

    with Float64():
        made = ours(model, FEW[method])
        weight = made.model.layers[1].self_attn.q_proj.weight
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
        (gradient,) = torch.autograd.grad(last(made), weight)
        slow = [slowly(model, FEW[method]) for _ in range(2)]
        for sign, other in zip((1, -1), slow, strict=True):
            other.model.layers[1].self_attn.q_proj.weight.data += sign * 1e-6 * direction
        difference = (last(slow[0]) - last(slow[1])) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-3)
    assert abs(difference.item()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_encoders_and_cross_attention_stay_exact(method):
    bert = tiny_model("bert")
    ids, mask = prompt()
    with torch.no_grad():
        one, two = (m(ids, attention_mask=mask).logits for m in (bert, ours(bert, FEW[method])))
    torch.testing.assert_close(one[mask.bool()], two[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.5,
        max_position_embeddings=64, dropout=0.0, forced_eos_token_id=None,
    )  # fmt: skip
    bart = BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    same(generate(ours(bart, ALL[method]), ids, mask), generate(bart, ids, mask))


@pytest.mark.parametrize("method", ["exact_topk", "lm_infinite"])
def test_prompt_lookup(method):
    model = tiny_model("llama")
    ids = random_ids(1, 6).repeat(1, 4)
    found = [
        m.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        for m in (model, ours(model, ALL[method]))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("lookup", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}])
def test_h2o_refuses_to_take_tokens_back(lookup):
    model = tiny_model("llama")
    if "assistant_model" in lookup:
        lookup = {"assistant_model": tiny_model("llama", seed=5)}
    with pytest.raises(ValueError, match=r"h2o' cannot remove tokens.*'sparq' or 'exact_topk'"):
        ours(model, FEW["h2o"]).generate(
            random_ids(1, 6).repeat(1, 4), max_new_tokens=12, do_sample=False, **lookup
        )


def test_h2o_needs_its_own_cache():
    model = ours(tiny_model("llama"), FEW["h2o"])
    ids, mask = prompt()
    message = r"h2o' needs the cache that transformers makes for it"
    for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=32)):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, mask, past_key_values=cache)


def test_h2o_refuses_what_it_has_not_followed():
    model = ours(tiny_model("llama"), FEW["h2o"])
    ids = random_ids(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        cache = model(ids, position_ids=positions, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="the cache holds packed documents"):
            model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[4]]))
        cache = model(ids, use_cache=True).past_key_values
        heads = torch.ones(1, 4, 1, 9, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"h2o' has dropped keys .* Pass a 2D attention_mask"):
            model(ids[:, :1], attention_mask=heads, past_key_values=cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactTopKConfig(top_k=0), "ExactTopKConfig: top_k must be an integer >= 1"),
        (lambda: ExactTopKConfig(top_k=4, local_window=5), "local_window must be an integer from"),
        (lambda: H2OConfig(top_k=4, local_window=0), "local_window must be an integer from 1 to 4"),
        (lambda: H2OConfig(top_k=True), "H2OConfig: top_k must be an integer >= 1, got True"),
        (lambda: LMInfiniteConfig(window=0), "LMInfiniteConfig: window must be an integer >= 1"),
        (lambda: LMInfiniteConfig(num_sink_tokens=-1), "num_sink_tokens must be an integer >= 0"),
    ],
)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_are_saved_with_the_model(tmp_path):
    config = tiny_config("llama")
    for parameters in FEW.values():
        configure(config, parameters)
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert {name: type(p)(**loaded.attn_params[name]) for name, p in FEW.items()} == FEW
