"""Prompts as the harness writes them, and the boundary between the tokens of prompt and answer."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from fbs_rl.rl.answer_format import AnswerFormat, GoldText, Heading, Turn, encode_question
from fbs_rl.rl.questions import Question, SourceQuestion
from tests.small_tokenizer import END, saveable_tokenizer


def choice(
    text: str, choices: tuple[str, ...], gold: int, subject: str = "college_biology", language: str = "en"
) -> SourceQuestion:  # fmt: skip
    return SourceQuestion("s", subject, "dev", "0", text, choices, gold, choices[gold], language)


ORGAN = choice("Which organ is in the thorax?", ("Liver", "Lung"), 1)
DUCK = choice("产蛋量最高的是", ("高邮鸭", "绍鸭"), 1, language="zh")
OPEN = SourceQuestion("s", "", "", "0", "还剩多少页？", (), None, "9", "zh")

ENGLISH = (
    "The following are multiple choice questions (with answers) about college biology.\n\n"
    "Which organ is in the thorax?\nA. Liver\nB. Lung\nAnswer:"
)


def test_the_prompt_is_that_of_the_harness() -> None:
    made = AnswerFormat().render(ORGAN)
    assert (made.prompt, made.answer) == (ENGLISH, " B. Lung")
    assert (made.id, made.language, made.source) == ("s/college_biology/dev/0", "en", "s")
    made = AnswerFormat().render(DUCK)
    assert made.prompt == (
        "以下是单项选择题，请直接给出正确答案的选项。\n\n产蛋量最高的是\nA. 高邮鸭\nB. 绍鸭\n答案："
    )
    assert made.answer == " B. 绍鸭"


def test_without_a_subject_or_a_heading() -> None:
    plain = choice("Why?", ("a", "b"), 0, subject="")
    heading = "The following are multiple choice questions (with answers).\n\n"
    asked = "Why?\nA. a\nB. b\nAnswer:"
    assert AnswerFormat().render(plain).prompt == heading + asked
    assert AnswerFormat(heading=Heading.NONE).render(plain).prompt == asked


@pytest.mark.parametrize(
    "gold, answer",
    [(GoldText.OPTION, " B. Lung"), (GoldText.LETTER, " B"), (GoldText.TEXT, " Lung")],
)
def test_what_is_scored(gold: GoldText, answer: str) -> None:
    made = AnswerFormat(gold).render(ORGAN)
    assert (made.prompt, made.answer) == (ENGLISH, answer)
    opened = AnswerFormat(gold).render(OPEN)
    assert (opened.prompt, opened.answer) == ("还剩多少页？\n答案：", " 9")


def test_shots_stand_between_heading_and_question() -> None:
    shots = [choice(f"Q{n}?", ("yes", "no"), n % 2) for n in range(3)]
    made = AnswerFormat(shots=2).render(ORGAN, shots)
    heading, asked = ENGLISH.split("\n\n")
    assert made.prompt == (
        f"{heading}\n\nQ0?\nA. yes\nB. no\nAnswer: A. yes\n\nQ1?\nA. yes\nB. no\nAnswer: B. no\n\n{asked}"
    )
    assert AnswerFormat(shots=2).render(ORGAN, shots[:1]).prompt.count("Answer:") == 2
    with pytest.raises(ValueError, match="-1 shots were asked for"):
        AnswerFormat(shots=-1)


def test_a_verbatim_question_stays_as_it_is() -> None:
    whole = SourceQuestion("s", "", "", "0", "Two is \n", (), None, "2\n", "en", verbatim=True)
    made = AnswerFormat(shots=1).render(whole, [ORGAN])
    assert (made.prompt, made.answer) == ("Two is \n", "2\n")


# --- tokens -----------------------------------------------------------------------------------------


def question(prompt: str, answer: str) -> Question:
    return Question("q", prompt, answer, "en", "", "s")


@pytest.mark.parametrize("source", [ORGAN, DUCK, OPEN], ids=["english", "chinese", "open"])
def test_ids_are_those_of_prompt_and_whole(source: SourceQuestion) -> None:
    tokenizer = saveable_tokenizer()
    made = AnswerFormat().render(source)
    found = encode_question(made, tokenizer, AnswerFormat(), 500)
    assert found is not None
    assert list(found.prompt_ids) == tokenizer(made.prompt)["input_ids"]
    whole = tokenizer(made.prompt + made.answer)["input_ids"]
    assert [*found.prompt_ids, *found.answer_ids] == whole


def test_a_token_across_the_boundary_is_cut_there() -> None:
    tokenizer = saveable_tokenizer()
    asked = question("Readers skip so", "me of the words.")
    prompt_ids = tokenizer(asked.prompt)["input_ids"]
    whole = tokenizer(asked.prompt + asked.answer)["input_ids"]
    assert whole[: len(prompt_ids)] != prompt_ids  # else this test shows nothing
    found = encode_question(asked, tokenizer, AnswerFormat(), 500)
    assert found is not None
    assert list(found.prompt_ids) == prompt_ids
    assert tokenizer.decode([*found.prompt_ids, *found.answer_ids]) == asked.prompt + asked.answer


def with_start_token(chat: bool) -> Any:
    made: Any = saveable_tokenizer(chat)
    start = made.convert_tokens_to_ids(END)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, start)]
    )
    return made, start


@pytest.mark.parametrize("across", [False, True], ids=["between tokens", "across a token"])
def test_a_start_token_comes_once(across: bool) -> None:
    tokenizer, start = with_start_token(chat=False)
    asked = question("Readers skip so", "me.") if across else question("A book:", " fox")
    found = encode_question(asked, tokenizer, AnswerFormat(), 500)
    assert found is not None
    assert found.prompt_ids[0] == start
    assert start not in found.prompt_ids[1:] + found.answer_ids


def test_a_chat_ends_where_the_reply_begins() -> None:
    tokenizer, start = with_start_token(chat=True)
    as_chat = AnswerFormat(turn=Turn.CHAT)
    found = encode_question(question("Which?\nAnswer:", " B. fox"), tokenizer, as_chat, 500)
    assert found is not None
    text = "[user] Which?\nAnswer:\n[assistant] "
    assert tokenizer.decode(found.prompt_ids) == text
    assert tokenizer.decode([*found.prompt_ids, *found.answer_ids]) == text + "B. fox"
    assert start not in found.prompt_ids  # the template would have written it
    with pytest.raises(ValueError, match="no chat template; use the turn `completion`"):
        encode_question(question("x", " y"), saveable_tokenizer(), as_chat, 500)


def test_a_template_that_thinks_is_told_not_to() -> None:
    tokenizer: Any = saveable_tokenizer(chat=True)
    tokenizer.chat_template += "{% if enable_thinking %}<think>{% else %}</think>{% endif %}"
    as_chat = AnswerFormat(turn=Turn.CHAT)
    found = encode_question(question("x", " y"), tokenizer, as_chat, 500)
    assert found is not None and tokenizer.decode(found.prompt_ids).endswith("</think>")


def test_a_long_prompt_is_dropped_whole() -> None:
    tokenizer, asked = saveable_tokenizer(), question("Readers skip", " words, and the layers")
    length = len(tokenizer("Readers skip")["input_ids"])
    assert encode_question(asked, tokenizer, AnswerFormat(), length) is not None
    assert encode_question(asked, tokenizer, AnswerFormat(), length - 1) is None


def test_a_question_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="finds no token in the prompt or the answer of q"):
        encode_question(question("", " y"), saveable_tokenizer(), AnswerFormat(), 500)
    with pytest.raises(ValueError, match="finds no token"):
        encode_question(question("x", ""), saveable_tokenizer(), AnswerFormat(), 500)
