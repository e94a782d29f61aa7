"""Needle cases: exact lengths after encoding again, the needle where it was asked for."""

import random
import subprocess
import sys

import pytest

from hf_attn_plugin.lm_eval import KEYS, NeedleTemplate, make_needle_case


@pytest.fixture(scope="module")
def haystack(any_tokenizer, text):
    return any_tokenizer(text[:60_000], add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("distractors", [0, 2])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [160, 161, 500])
def test_the_text_encoded_again_has_exactly_the_length(
    any_tokenizer, haystack, length, depth, distractors
):
    for seed in range(5):
        case = make_needle_case(
            any_tokenizer,
            haystack,
            length,
            depth,
            random.Random(seed),
            num_distractors=distractors,
        )
        prompt_ids = any_tokenizer(case.prompt)["input_ids"]
        assert prompt_ids == list(case.prompt_ids)
        full_ids = any_tokenizer(case.prompt + case.answer)["input_ids"]
        assert full_ids == [*case.prompt_ids, *case.answer_ids]
        assert len(full_ids) == length
        assert case.prompt.count("The secret number of") == 2 + distractors
        needle = f"The secret number of {case.key} is {case.value}."
        assert needle in case.context
        assert case.prompt.endswith(f"The secret number of {case.key} is")
        after = any_tokenizer.decode(case.prompt_ids[case.needle_start :])
        assert after.strip().startswith(needle)
        before = any_tokenizer.decode(case.prompt_ids[: case.needle_start])
        assert needle not in before


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_sits_at_the_depth(tokenizer, text, depth):
    haystack = tokenizer(text[:60_000], add_special_tokens=False)["input_ids"]
    case = make_needle_case(tokenizer, haystack, 1000, depth, random.Random(0))
    sentences = len(tokenizer(case.question)["input_ids"]) * 2 + 8
    assert case.needle_start == pytest.approx(depth * (1000 - sentences), abs=12)


def test_room_for_the_answer_is_kept_free(tokenizer, text, rng):
    haystack = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    case = make_needle_case(tokenizer, haystack, 200, 0.5, rng, answer_room=8)
    assert len(case.prompt_ids) == 192
    assert len(case.answer_ids) <= 8


def test_the_same_seed_gives_the_same_case(tokenizer, text):
    haystack = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    first, second, other = (
        make_needle_case(tokenizer, haystack, 200, 0.5, random.Random(seed)) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_a_haystack_of_many_byte_characters(tokenizer, rng):
    text = "Ünïcödé 漢字 😀 " * 400
    haystack = tokenizer(text, add_special_tokens=False)["input_ids"]
    case = make_needle_case(tokenizer, haystack, 300, 0.5, rng)
    assert len(tokenizer(case.prompt + case.answer)["input_ids"]) == 300


def test_another_template(tokenizer, text, rng):
    template = NeedleTemplate(
        needle=" pass {key} = {value};", question=" pass {key} =", keys=("gate",), digits=2
    )
    haystack = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    case = make_needle_case(tokenizer, haystack, 100, 0.5, rng, template)
    assert f" pass gate = {case.value};" in case.context
    assert len(case.value) == 2
    assert case.question == " pass gate ="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1.5}, "depth must be within 0"),
        ({"length": 12}, "no room for a needle"),
        ({"length": 5000}, "give more text"),
        ({"answer_room": 1}, "answer_room is 1"),
        ({"num_distractors": len(KEYS)}, "num_distractors"),
    ],
)
def test_wrong_arguments_are_refused(tokenizer, text, rng, arguments, message):
    haystack = tokenizer(text[:5_000], add_special_tokens=False)["input_ids"]
    given = {"length": 200, "depth": 0.5, **arguments}
    with pytest.raises(ValueError, match=message):
        make_needle_case(tokenizer, haystack, rng=rng, **given)


@pytest.mark.parametrize(
    "fields",
    [
        {"needle": "no value"},
        {"question": "{value}?"},
        {"answer": " forty-two"},
        {"keys": ()},
        {"digits": 0},
    ],
)
def test_wrong_templates_are_refused(fields):
    with pytest.raises(ValueError, match="NeedleTemplate"):
        NeedleTemplate(**fields)


def test_the_keys_are_different_plain_words():
    assert len(set(KEYS)) == len(KEYS) >= 64
    assert all(key.isalpha() and key.islower() for key in KEYS)


def test_importing_needs_neither_transformers_nor_lm_eval():
    code = (
        "import sys, hf_attn_plugin.lm_eval; "
        "assert not {'transformers', 'torch', 'lm_eval'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
