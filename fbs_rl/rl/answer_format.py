"""Questions as prompts and gold answers, in the form of the usual evaluation harnesses, and as token ids.

The prompt is that of lm-evaluation-harness for MMLU, CMMLU and C-Eval:

    The following are multiple choice questions (with answers) about anatomy.

    Which organ is found in the thorax?
    A. Liver
    B. Lung
    Answer:

In Chinese the last line is `答案：`. The gold answer is the harness's ` B` with the text of the option after it,
` B. Lung`: answer prefix and gold option text (SPEC (2)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fbs_rl.rl.question_readers import LETTERS
from fbs_rl.rl.questions import EncodedQuestion, Question, SourceQuestion


class GoldText(StrEnum):
    """What is scored of the right option; an open question's answer is always its text."""

    OPTION = "option"  # " B. Lung"
    LETTER = "letter"  # " B", what the harness scores
    TEXT = "text"  # " Lung"


class Turn(StrEnum):
    """How the prompt reaches the model."""

    COMPLETION = "completion"  # as it is
    CHAT = "chat"  # a user's message in the tokenizer's chat template; the answer begins the reply


class Heading(StrEnum):
    """What stands above the questions."""

    HARNESS = "harness"  # the sentence of the harness; nothing above open questions
    NONE = "none"


_ENGLISH_HEADING = "The following are multiple choice questions (with answers) about {}.\n\n"
_CHINESE_HEADING = "以下是单项选择题，请直接给出正确答案的选项。\n\n"
_CUES = {"en": "Answer:", "zh": "答案："}


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How questions become text. shots: solved examples before the question, from the set's dev split.

    Limit: the harness names the subject in Chinese headings too; here they do not, since the files do not.
    """

    gold: GoldText = GoldText.OPTION
    turn: Turn = Turn.COMPLETION
    heading: Heading = Heading.HARNESS
    shots: int = 0

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"{self.shots} shots were asked for; give 0 or more")

    def render(self, question: SourceQuestion, shots: Sequence[SourceQuestion] = ()) -> Question:
        """The question with the first `self.shots` of `shots` before it; a verbatim one as it is."""
        prompt, answer = question.text, question.answer
        if not question.verbatim:
            solved = [
                f"{self._asked(shot)}{self._answer(shot)}\n\n" for shot in shots[: self.shots]
            ]
            prompt = "".join([self._heading(question), *solved, self._asked(question)])
            answer = self._answer(question)
        return Question(
            question.id, prompt, answer, question.language, question.subject, question.source
        )

    def _heading(self, question: SourceQuestion) -> str:
        if self.heading is Heading.NONE or not question.choices:
            return ""
        if question.language == "zh":
            return _CHINESE_HEADING
        subject = question.subject.replace("_", " ")
        return (
            _ENGLISH_HEADING.format(subject)
            if subject
            else _ENGLISH_HEADING.replace(" about {}", "")
        )

    def _asked(self, question: SourceQuestion) -> str:
        options = [f"{LETTERS[n]}. {choice}" for n, choice in enumerate(question.choices)]
        return "\n".join([question.text, *options, _CUES[question.language]])

    def _answer(self, question: SourceQuestion) -> str:
        if question.gold is None or self.gold is GoldText.TEXT:
            return f" {question.answer}"
        letter = LETTERS[question.gold]
        return f" {letter}" if self.gold is GoldText.LETTER else f" {letter}. {question.answer}"


def encode_question(
    question: Question, tokenizer: Any, answer_format: AnswerFormat, max_prompt_tokens: int
) -> EncodedQuestion | None:
    """Ids of prompt and answer, or None if the prompt has more than `max_prompt_tokens`; nothing is ever cut.

    `prompt_ids` are the tokenizer's for the prompt alone, with its start token if it has one: what a server
    feeds for the same text. `answer_ids` are what the tokenizer adds when the answer follows, or, where a token
    would reach across the boundary, its ids for the answer alone. So the sequence that is scored is always
    prompt_ids + answer_ids, and it decodes to prompt and answer. No end token is added.

    As a chat, the answer loses its leading space, and templates that let a model think first are told not to.
    Raises ValueError if the tokenizer has no chat template but one is needed, or finds no token in the text.
    """
    prompt, answer, special = question.prompt, question.answer, True
    if answer_format.turn is Turn.CHAT:
        # The template writes its own start token.
        prompt, answer, special = _as_chat(prompt, tokenizer), answer.lstrip(), False
    prompt_ids = _ids(tokenizer, prompt, special)
    if len(prompt_ids) > max_prompt_tokens:
        return None
    both = _ids(tokenizer, prompt + answer, special)
    joined = both[: len(prompt_ids)] == prompt_ids
    answer_ids = both[len(prompt_ids) :] if joined else _ids(tokenizer, answer, special=False)
    if not prompt_ids or not answer_ids:
        raise ValueError(
            f"the tokenizer finds no token in the prompt or the answer of {question.id}"
        )
    return EncodedQuestion(question.id, tuple(prompt_ids), tuple(answer_ids))


def _as_chat(prompt: str, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use the turn `completion`")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # of Qwen3; templates without it ignore it
    )


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]
