"""A tokenizer of printable ASCII for tests.tiny's models: one token a character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fbs_rl.rl.questions import Question

_FIRST = 32


@dataclass(frozen=True)
class Letters:
    """Token 0 is the space. eos_token_id: what ends a text, if anything does."""

    eos_token_id: int | None = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) - _FIRST for char in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(_FIRST + i) for i in ids)


def question(index: int, prompt: str, answer: str) -> Question:
    return Question(f"set/{index}", prompt, answer, "en", "", "set")


QUESTIONS = (
    question(0, "How many legs has a fox?", " Four, as a dog"),
    question(1, "2 + 2 =", " 4"),
    question(2, "Which of these is a colour? red, run", " red."),
)
