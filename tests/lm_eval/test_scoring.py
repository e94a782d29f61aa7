"""Scores, checked by hand and against what the published scorers are known to do."""

import pytest

from hf_attn_plugin.lm_eval.repetition import repetition_score
from hf_attn_plugin.lm_eval.scoring import (
    begins_with_answer,
    exact_match,
    f1,
    rouge_l,
    squad_normalize,
    triviaqa_normalize,
)
from hf_attn_plugin.lm_eval.summarization import cnn_dailymail_score


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("  denver \t broncos\n", "denver broncos"),
        ("Denver Broncos.", "denver broncos"),
        ("U.S.", "us"),  # punctuation leaves no blank behind
        ("24-10", "2410"),
        ("24\u201310", "24\u201310"),  # only ASCII punctuation
        ("An apple a day, the end", "apple day end"),
        ("theatre", "theatre"),  # an article is a word
        ("a.b", "ab"),  # punctuation goes before articles do
        ("", ""),
    ],
)
def test_squad_normalization(text, normalized):
    assert squad_normalize(text) == normalized


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Spider-Man", "spider man"),  # a blank here, nothing in SQuAD's
        ("snow_white", "snow white"),
        ("Rock \u2019n\u2019 Roll", "rock n roll"),
        ("The 'Beatles'", "beatles"),
        ("a.b", "b"),  # "a" has become a word of its own
    ],
)
def test_triviaqa_normalization(text, normalized):
    assert triviaqa_normalize(text) == normalized


def test_exact_match_takes_the_best_of_several_answers():
    golds = ["Denver Broncos", "the Broncos"]
    assert exact_match("Broncos!", golds) == 1.0
    assert exact_match("the denver broncos", golds) == 1.0
    assert exact_match("The Denver Broncos won", golds) == 0.0
    assert exact_match("spider man", ["Spider-Man"]) == 0.0
    assert exact_match("spider man", ["Spider-Man"], triviaqa_normalize) == 1.0


@pytest.mark.parametrize(
    ("prediction", "golds", "score"),
    [
        ("Denver Broncos", ["The Denver Broncos"], 1.0),
        # 2 common words, 4 given, 2 right: precision 1/2, recall 1.
        ("Denver Broncos won it", ["Denver Broncos"], 2 / 3),
        # The better answer counts: 1 of 1 and 1 of 3.
        ("Carolina", ["Denver Broncos", "the Carolina Panthers team"], 0.5),
        # A word counts as often as it occurs on both sides: 1 of 3 and 1 of 1.
        ("no no no", ["no"], 0.5),
        ("yes", ["no"], 0.0),
        ("", ["no"], 0.0),
        ("the", ["a"], 0.0),  # nothing is left on either side: v1.1 sees no common word
    ],
)
def test_f1(prediction, golds, score):
    assert f1(prediction, golds) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (" Denver Broncos", True),
        (' "The Denver Broncos", who', True),
        ("denver broncos won", True),
        ("Denver Broncossss", True),  # as published: a beginning, not a word
        ("It was the Denver Broncos", False),
        ("Denver", False),
        ("", False),
    ],
)
def test_the_papers_accuracy(prediction, right):
    assert begins_with_answer(prediction, ["The Denver Broncos", "Broncos,"]) == right


def test_an_answer_of_punctuation_alone_is_not_found_in_everything():
    assert begins_with_answer("whatever", ['"."']) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # Lin (2004): the longest common subsequence of "police kill the gunman" and "police killed
        # the gunman" is 3 words without stems, 4 with them.
        ("police kill the gunman", "police killed the gunman", 1.0),
        ("the gunman police killed", "police killed the gunman", 0.5),
        # Subsequence "the cat" of 3 words: precision 2/3, recall 2/6.
        ("the cat slept", "the cat was on the mat", 2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6)),
        ("dogs", "the cat", 0.0),
        ("", "the cat", 0.0),
    ],
)
def test_rouge_l(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score)


def test_a_summary_is_cut_to_the_words_of_the_reference():
    document = {"reference": "police killed\nthe gunman"}
    right = " Police killed the gunman and a model goes on and on"
    assert cnn_dailymail_score(document, [right]) == {"rouge_l": 1.0}
    assert rouge_l(right, document["reference"]) < 0.6
    assert cnn_dailymail_score(document, [" \n"]) == {"rouge_l": 0.0}


@pytest.mark.parametrize(
    ("generated", "matched"),
    [
        (" to be or not", 12),
        ("to be or not", 12),  # a blank lost in decoding is no error
        (" to be or not to be", 12),
        (" to be of", 7),
        (" To be or not", 0),
        (" to be", 5),
        ("", 0),
    ],
)
def test_repetition_counts_characters_up_to_the_first_error(generated, matched):
    score = repetition_score({"reference": " to be or not"}, [generated])
    assert score == {"matched_characters": matched, "matched_share": matched / 12}
