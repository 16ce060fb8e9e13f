"""A question as tokens, and whether an episode can be made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fbs_rl.rl.answer_format import AnswerFormat, encode_question
from fbs_rl.rl.questions import EncodedQuestion, Question

Encoder = Callable[[Question, Any], EncodedQuestion]
"""From (question, tokenizer)."""
MIN_ANSWER_TOKENS = 2
"""The first token of an answer follows from the prompt, where nothing skips; so an answer of one says nothing."""
_UNLIMITED = 2**31


def encode_completion(question: Question, tokenizer: Any) -> EncodedQuestion:
    """The prompt as a text to complete, without a chat template, and behind it the answer."""
    found = encode_question(question, tokenizer, AnswerFormat(), _UNLIMITED)
    assert found is not None
    return found


def check_fits(encoded: EncodedQuestion, max_new_tokens: int, context: int) -> None:
    """Raise ValueError for a question that no episode can be made of."""
    prompt, gold = len(encoded.prompt_ids), len(encoded.answer_ids)
    if gold < MIN_ANSWER_TOKENS:
        raise ValueError(
            f"the answer of question {encoded.id} has {gold} token; it needs at least {MIN_ANSWER_TOKENS}, since "
            f"the first follows from the prompt, where nothing skips"
        )
    longest = prompt + max(gold, max_new_tokens)
    if longest > context:
        raise ValueError(
            f"question {encoded.id} needs {longest} tokens ({prompt} of its prompt), but the model's context "
            f"is {context}; leave it out or lower max_new_tokens"
        )
