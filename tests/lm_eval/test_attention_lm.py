"""The lm-eval model `hf-attn`: decoding measured, nothing truncated, reads counted."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from hf_attn_plugin import SlidingWindowConfig, SparQConfig, configure
from hf_attn_plugin.lm_eval.model import AttentionLM

# (context, continuation) in tokens; two rows of equal lengths can share a batch.
SHAPES = [(90, 12), (90, 12), (40, 7), (3, 1), (1, 9)]


@pytest.fixture(scope="module")
def pairs(tokenizer, text):
    ids = tokenizer(text[5_000:25_000], add_special_tokens=False)["input_ids"]
    requests = []
    for index, (context, continuation) in enumerate(SHAPES):
        piece = ids[index * 200 :][: context + continuation]
        requests.append((None, piece[:context], piece[context:]))
    return requests


def make(model, tokenizer, **options):
    return AttentionLM(model, tokenizer=tokenizer, batch_size=4, progress=False, **options)


def score(lm, pairs):
    answers = lm._loglikelihood_tokens(list(pairs), disable_tqdm=True)
    return torch.tensor([value for value, _ in answers]), [greedy for _, greedy in answers]


def generate(lm, prompts, max_gen_toks=6, **options):
    options |= {"until": ["§"], "max_gen_toks": max_gen_toks}
    requests = [Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts]
    return lm.generate_until(requests, disable_tqdm=True)


def test_lm_eval_knows_the_model_and_still_its_own():
    assert get_model("hf-attn") is AttentionLM
    assert get_model("hf").__name__ == "HFLM"
    assert issubclass(AttentionLM, get_model("hf"))


def test_decoding_gives_the_log_likelihoods_of_one_forward_pass(model, tokenizer, pairs):
    stock, stock_greedy = score(make(model, tokenizer), pairs)
    decoded, greedy = score(make(model, tokenizer, decode_continuation=True), pairs)
    torch.testing.assert_close(decoded, stock, rtol=0, atol=1e-4)
    assert greedy == stock_greedy


def test_the_greedy_continuation_is_recognised(model, tokenizer, pairs):
    context = pairs[0][1]
    output = model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)
    best = output[0, len(context) :].tolist()
    wrong = [*best[:-1], (best[-1] + 1) % len(tokenizer)]
    for decode in (False, True):
        lm = make(model, tokenizer, decode_continuation=decode)
        assert score(lm, [(None, context, best), (None, context, wrong)])[1] == [True, False]


def test_sparq_is_measured_in_decoding(model, tokenizer, pairs):
    dense, _ = score(make(model, tokenizer), pairs)
    model.set_attn_implementation("sparq")
    configure(model, SparQConfig(rank=2, top_k=8))
    lm = make(model, tokenizer)
    assert lm.decode_continuation
    sparse, _ = score(lm, pairs)
    assert (sparse - dense).abs().max() > 0.05
    # Its prefill is dense: a single forward pass says nothing about it.
    with pytest.raises(ValueError, match=r"'sparq' acts in decoding only.*'flash'"):
        make(model, tokenizer, decode_continuation=False)
    configure(model, SparQConfig(rank=8, top_k=256))
    everything, _ = score(make(model, tokenizer), pairs)
    torch.testing.assert_close(everything, dense, rtol=0, atol=1e-4)


def test_a_window_is_the_same_in_decoding_and_in_one_pass(model, tokenizer, pairs):
    dense, _ = score(make(model, tokenizer), pairs)
    model.set_attn_implementation("sliding_window")
    configure(model, SlidingWindowConfig(window=16))
    one_pass, _ = score(make(model, tokenizer), pairs)
    decoded, _ = score(make(model, tokenizer, decode_continuation=True), pairs)
    assert (one_pass - dense).abs().max() > 0.05
    torch.testing.assert_close(decoded, one_pass, rtol=0, atol=1e-4)


def test_generation_is_the_same_with_every_token_decoded(model, tokenizer, text):
    # Of different lengths, so that the batch is padded on the left.
    prompts = [text[5_000:5_400], text[6_000:6_090], text[7_000:7_250]]
    stock = generate(make(model, tokenizer), prompts)
    assert generate(make(model, tokenizer, decode_continuation=True), prompts) == stock
    model.set_attn_implementation("sparq")
    configure(model, SparQConfig(rank=8, top_k=256))
    assert generate(make(model, tokenizer), prompts) == stock
    configure(model, SparQConfig(rank=1, top_k=2))
    assert generate(make(model, tokenizer), prompts) != stock


def test_beams_over_a_prefilled_cache(model, tokenizer, text):
    prompts = [text[1_000:1_400], text[3_000:3_200]]
    stock = generate(make(model, tokenizer), prompts, num_beams=2)
    decoded = generate(make(model, tokenizer, decode_continuation=True), prompts, num_beams=2)
    assert decoded == stock


def test_reads_are_counted_exactly(model, tokenizer, pairs):
    context, continuation = 90, 12
    lm = make(model, tokenizer, decode_continuation=True)
    with lm._counting():
        lm._loglikelihood_tokens([pairs[0]], disable_tqdm=True)
    assert lm.reads.decode_steps == continuation
    # The first step reads the context, its own last token included; each further one a key more.
    keys = sum(context + step for step in range(continuation))
    config = model.config
    per_key = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert lm.reads.kv_bytes_read == lm.reads.kv_bytes_dense == keys * per_key


def test_too_long_prompts_are_errors(model, tokenizer, text):
    ids = tokenizer(text[:20_000])["input_ids"]
    lm = make(model, tokenizer)
    with pytest.raises(ValueError, match="a prompt of 256 tokens does not fit: the model takes"):
        generate(lm, [tokenizer.decode(ids[1:256])])
    with pytest.raises(ValueError, match="a prompt of 260 tokens does not fit"):
        score(lm, [(None, ids[:250], ids[250:261])])
    for decode in (False, True):
        cutting = make(model, tokenizer, truncation=True, decode_continuation=decode)
        longer, _ = score(cutting, [(None, ids[:300], ids[300:310])])
        just, _ = score(cutting, [(None, ids[53:300], ids[300:310])])
        torch.testing.assert_close(longer, just, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "sparkle"}, "'sparkle' is not registered.*sparq"),
        ({"attn_params": {"sparq": {"rnk": 3}}}, "no parameter 'rnk'"),
        ({"attn_params": {"sparkle": {}}}, "unknown method 'sparkle'"),
        (
            {"attn_implementation": "sparq", "attn_params": {"sparq": {"rank": 999}}},
            "rank must be an integer from 1 to 8",
        ),
    ],
)
def test_wrong_names_and_parameters_are_refused(model, tokenizer, tmp_path, options, message):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AttentionLM(str(tmp_path), device="cpu", **options)


def test_a_saved_model_is_loaded_with_name_and_parameters(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = AttentionLM(
        str(tmp_path),
        device="cpu",
        attn_implementation="sparq",
        attn_params={"sparq": {"rank": 4, "top_k": 16}},
    )
    info = lm.get_model_info()
    assert info["attn_implementation"] == "sparq"
    assert info["attn_params"]["sparq"]["rank"] == 4
    assert info["decode_continuation"] is True


def test_a_model_in_memory_keeps_its_own_attention(model, tokenizer):
    with pytest.raises(ValueError, match="attn_implementation cannot be passed with a model in"):
        make(model, tokenizer, attn_implementation="sparq")
