"""Needle in a haystack: one sentence hidden in a long text, of exactly the length asked for."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedTokenizerBase

_WORDS = """
anchor apple autumn basket bottle bridge butter button candle carpet castle cherry circle copper
corner cotton desert dinner doctor dragon engine falcon farmer feather finger flower forest garden
ginger guitar hammer harbor helmet island jacket kitchen ladder lemon marble meadow mirror monkey
mountain needle orange palace pencil pepper pillow planet pocket rabbit ribbon river saddle salmon
shadow silver spider summer temple ticket tunnel violin winter window
"""

KEYS: tuple[str, ...] = tuple(_WORDS.split())
"""Plain words that name a secret."""

_ATTEMPTS = 50
_ADJUSTMENTS = 12


@dataclasses.dataclass(frozen=True)
class NeedleTemplate:
    r"""The sentence that is hidden, and how the model is asked for it.

    The question is the needle again, cut before its value: a base model answers it by
    continuing the text, an instruction-tuned one likewise, and the answer is a plain number.

    Attributes:
        needle: The sentence, with the fields ``{key}`` and ``{value}``.
        question: The end of the prompt, with the field ``{key}``.
        questions: The end of the prompt where several values are asked for, with the field
            ``{keys}``: one key, or several as "a, b and c".
        answer: What follows the question, with the field ``{value}``: one, or several as
            "1, 2 and 3".
        keys: The words that ``{key}`` is drawn from, at least one.
        values: The words that ``{value}`` is drawn from; none makes it a number.
        digits: Decimal digits of a number, 1 to 18; the first one is never zero.
    """

    needle: str = "\nThe secret number of {key} is {value}.\n"
    question: str = "\nThe secret number of {key} is"
    questions: str = "\nThe secret numbers of {keys} are"
    answer: str = " {value}"
    keys: tuple[str, ...] = KEYS
    values: tuple[str, ...] = ()
    digits: int = 4

    def __post_init__(self) -> None:
        for name, required, allowed in (
            ("needle", {"value"}, {"key", "value"}),
            ("question", set(), {"key"}),
            ("questions", set(), {"keys"}),
            ("answer", {"value"}, {"value"}),
        ):
            text = getattr(self, name)
            try:
                fields = {field for _, field, _, _ in string.Formatter().parse(text) if field}
            except ValueError as error:
                raise ValueError(
                    f"NeedleTemplate: the braces of {name} do not match in {text!r} ({error})."
                ) from error
            if not required <= fields or not fields <= allowed:
                raise ValueError(
                    f"NeedleTemplate: {name} must contain {sorted(required) or 'no field'} and may "
                    f"contain {sorted(allowed)} in braces, got {text!r}."
                )
        if not self.keys:
            raise ValueError("NeedleTemplate: keys must hold at least one word, got none.")
        unclear = [value for value in self.values if not re.fullmatch(r"\w+", value)]
        if unclear:
            raise ValueError(
                f"NeedleTemplate: values must be single words, to be found again in an answer, "
                f"got {', '.join(map(repr, unclear))}."
            )
        if not 1 <= self.digits <= 18:
            raise ValueError(f"NeedleTemplate: digits must be 1 to 18, got {self.digits}.")

    def draw_value(self, rng: random.Random) -> str:
        """One of ``values``, or a number of ``digits`` decimal digits."""
        if self.values:
            return rng.choice(self.values)
        return str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))

    def draw_values(self, rng: random.Random, count: int) -> list[str]:
        """Different values, all of one key."""
        possible = len(set(self.values)) or 9 * 10 ** (self.digits - 1)
        if count > possible:
            raise ValueError(
                f"NeedleTemplate: {count} different values of a key are wanted, but there are "
                f"{possible}: name more values or more digits."
            )
        drawn: list[str] = []
        while len(drawn) < count:
            value = self.draw_value(rng)
            if value not in drawn:
                drawn.append(value)
        return drawn


@dataclasses.dataclass(frozen=True)
class NeedleCase:
    """One prompt with hidden needles, and its answer.

    Attributes:
        context: The haystack with the needle inside, as text.
        question: The end of the prompt, as text; the prompt is ``context + question``.
        answer: The continuation that is right, as text.
        values: The numbers or words that are asked for.
        keys: The words they belong to: one, or as many as there are values.
        prompt_ids: What the tokenizer makes of the prompt, special tokens included.
        answer_ids: The tokens that follow when the answer is appended to the prompt.
        length: Prompt tokens plus the tokens kept free for the answer.
        depth: Where the first needle sits: 0 at the start of the haystack, 1 at its end.
        needle_start: Index in ``prompt_ids`` of the first needle's first token.
    """

    context: str
    question: str
    answer: str
    values: tuple[str, ...]
    keys: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    length: int
    depth: float
    needle_start: int

    @property
    def value(self) -> str:
        """The first value: the only one unless several are asked for."""
        return self.values[0]

    @property
    def key(self) -> str:
        """The first key."""
        return self.keys[0]

    @property
    def prompt(self) -> str:
        """The whole prompt as text; encoding it gives ``prompt_ids``."""
        return self.context + self.question


def make_needle_case(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: Sequence[int],
    length: int,
    depth: float,
    rng: random.Random,
    template: NeedleTemplate | None = None,
    *,
    answer_room: int | None = None,
    num_distractors: int = 0,
    num_values: int = 1,
    num_queries: int = 1,
    add_special_tokens: bool = True,
) -> NeedleCase:
    """Hide a needle in a piece of the haystack, so that the result has exactly `length` tokens.

    The lengths are those of the *text* encoded again, as an evaluation harness will do it: token
    ids of pieces do not simply add up, so the filler is cut until the count is right.

    Args:
        tokenizer: Any transformers tokenizer that can decode what it encodes.
        haystack_ids: Token ids of any text, without special tokens; a random piece is used.
        length: Tokens of the prompt and the room for the answer together.
        depth: Where the needle sits in the haystack, 0 (start) to 1 (end). Where several values
            are asked for it is the first one's; the others are at random places.
        rng: Draws the key, the value and the piece of haystack.
        template: The sentences; None takes `NeedleTemplate()`.
        answer_room: Tokens kept free behind the prompt. None takes the answer's own tokens, so
            that prompt and answer together have `length` tokens.
        num_distractors: Needles of keys that are not asked for, at random places (RULER's
            multi-key retrieval, arXiv 2404.06654).
        num_values: Values of each key, each in a needle of its own, all asked for (multi-value).
        num_queries: Keys that are asked for (multi-query).
        add_special_tokens: Whether encoding adds the tokenizer's special tokens (a BOS).

    Returns:
        The case; ``len(prompt_ids) + answer_room == length``.

    Raises:
        ValueError: `depth` is not within 0 and 1, `length` has no room for the needle and the
            question, the haystack is shorter than the filler that is needed, there are not enough
            keys for the distractors, or no piece of the haystack gives the exact length.
    """
    template = template or NeedleTemplate()
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be within 0 (start) and 1 (end), got {depth}.")
    if min(num_values, num_queries) < 1:
        raise ValueError(
            f"num_values and num_queries must be at least 1, got {num_values} and {num_queries}."
        )
    if not 0 <= num_distractors <= len(template.keys) - num_queries:
        raise ValueError(
            f"num_distractors must be 0 to {max(len(template.keys) - num_queries, 0)}, "
            f"{num_queries} of the {len(template.keys)} keys being asked for, got "
            f"{num_distractors}."
        )

    def encode(text: str) -> list[int]:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])

    keys = rng.sample(template.keys, num_queries + num_distractors)
    hidden = [
        (key, value)
        for index, key in enumerate(keys)
        for value in template.draw_values(rng, num_values if index < num_queries else 1)
    ]
    needles = [template.needle.format(key=key, value=value) for key, value in hidden]
    asked_keys = tuple(keys[:num_queries])
    asked_values = tuple(value for _, value in hidden[: num_queries * num_values])
    question = template.question.format(key=keys[0])
    if len(asked_values) > 1:
        question = template.questions.format(keys=_enumerate(asked_keys))
    answer = template.answer.format(value=_enumerate(asked_values))

    bare = encode("".join(needles) + question)
    bare_answer = len(encode("".join(needles) + question + answer)) - len(bare)
    if answer_room is not None and answer_room < bare_answer:
        raise ValueError(
            f"answer_room is {answer_room} tokens, but the answer {answer!r} takes {bare_answer}."
        )
    room = bare_answer if answer_room is None else answer_room
    if len(bare) + room > length:
        raise ValueError(
            f"length {length} has no room for a needle: the needle, the question and the answer "
            f"alone take {len(bare) + room} tokens with this tokenizer."
        )
    filler = length - room - len(bare)
    if len(haystack_ids) < filler:
        raise ValueError(
            f"the haystack has {len(haystack_ids)} tokens, but length {length} needs {filler}: "
            "give more text or a shorter length."
        )

    for _ in range(_ATTEMPTS):
        start = rng.randrange(len(haystack_ids) - filler + 1)
        places = [depth, *(rng.random() for _ in needles[1:])]
        count = filler
        for _ in range(_ADJUSTMENTS):
            piece = [int(token) for token in haystack_ids[start : start + count]]
            before, context = _hide(tokenizer, piece, places, needles)
            prompt_ids = encode(context + question)
            full_ids = encode(context + question + answer)
            answer_ids = full_ids[len(prompt_ids) :]
            kept = len(answer_ids) if answer_room is None else answer_room
            missing = length - kept - len(prompt_ids)
            if missing == 0:
                break
            count = min(max(count + missing, 0), len(haystack_ids) - start)
        if missing or full_ids[: len(prompt_ids)] != prompt_ids or len(answer_ids) > kept:
            continue
        return NeedleCase(
            context=context,
            question=question,
            answer=answer,
            values=asked_values,
            keys=asked_keys,
            prompt_ids=tuple(prompt_ids),
            answer_ids=tuple(answer_ids),
            length=length,
            depth=depth,
            needle_start=_common_prefix(encode(before), prompt_ids),
        )
    raise ValueError(
        f"no piece of the haystack ({len(haystack_ids)} tokens) gave a prompt of exactly {length} "
        f"tokens in {_ATTEMPTS} attempts: give more text, or a tokenizer that encodes what it "
        "decodes and appends no special tokens."
    )


def _hide(
    tokenizer: PreTrainedTokenizerBase,
    piece: list[int],
    places: list[float],
    needles: list[str],
) -> tuple[str, str]:
    """The text before the first needle of the list, and the whole text with all needles."""
    order = sorted(range(len(needles)), key=lambda index: places[index])
    text, before, last = "", "", 0
    for index in order:
        cut = round(places[index] * len(piece))
        text += _decode(tokenizer, piece[last:cut])
        if index == 0:
            before = text
        text += needles[index]
        last = cut
    return before, text + _decode(tokenizer, piece[last:])


def _enumerate(words: Sequence[str]) -> str:
    """Words as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # A cut inside a character of several bytes leaves replacement characters at the ends.
    return str(text).strip("\ufffd")


def _common_prefix(first: list[int], second: list[int]) -> int:
    count = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        count += 1
    return count
