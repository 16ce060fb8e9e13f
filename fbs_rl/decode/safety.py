"""Guards of skipping (the paper's E.9): critical layers, structure in the text, validators with a fallback.

Everything here is about text and counts, without torch: `fbs_rl.decoding` turns a guard's verdict into the
forward's arguments, and so may any other engine. docs/safety.md lists the rules and why they are so.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fbs_rl.decode.structure import Structure, StructureState

Setting = TypeVar("Setting")
Made = TypeVar("Made")
Validator = Callable[[str], str | None]
"""What is wrong with a text, in one sentence, or None."""


def critical_layers(layer_count: int, first: int = 2, last: int = 6) -> tuple[int, ...]:
    """Indices of the first and the last layers, ascending: those that E.9 never skips.

    Raises ValueError where nothing would be left to skip.
    """
    if first < 0 or last < 0:
        raise ValueError(
            f"cannot protect the first {first} and the last {last} layers; give 0 or more"
        )
    if first + last >= layer_count:
        raise ValueError(
            f"protecting the first {first} and the last {last} of {layer_count} layers leaves none to skip; "
            f"protect fewer than {layer_count} together"
        )
    return (*range(first), *range(layer_count - last, layer_count))


# --- structure --------------------------------------------------------------------------------------

_INCOMPLETE = "\ufffd"  # what decoding gives for the first bytes of a character
_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes, so it spans at most four tokens


@dataclass(slots=True)
class TokenText:
    """The text that each token adds, held back while a character is incomplete; O(1) tokens are decoded a time.

    decode: of token ids. window: the last tokens; start it with the prompt's, since some decoders treat the
    first token of a text differently. Bytes that never become a character are left out or come as U+FFFD.
    """

    decode: Callable[[list[int]], str]
    window: list[int] = field(default_factory=list)
    _given: int = 0

    def __post_init__(self) -> None:
        self._trim()

    def push(self, token: int) -> str:
        """The whole characters that `token` completes."""
        self.window.append(token)
        text = self.decode(self.window)
        added = text.rstrip(_INCOMPLETE)[self._given :]
        self._given += len(added)
        # Cut between characters; where none ends for so long, the bytes are none.
        longest = _CHARACTER_TOKENS * (4 if text.endswith(_INCOMPLETE) else 2)
        if len(self.window) >= longest:
            self._trim()
        return added

    def _trim(self) -> None:
        self.window = self.window[-_CHARACTER_TOKENS:]
        self._given = len(self.decode(self.window).rstrip(_INCOMPLETE))


@dataclass(slots=True)
class StructureGuard:
    """Says, row by row, whether the next step must run every layer; one for each batch.

    A step is protected if structure is open before or after the token that it feeds: it then predicts text
    inside the structure or the end of it, or writes the cache entry of the token that ended it.
    kinds: per row, what each fed token was protected for (None: it may skip).
    """

    texts: list[TokenText]
    states: list[StructureState]
    kinds: list[list[Structure | None]]

    @classmethod
    def of(
        cls,
        decode: Callable[[list[int]], str],
        rows: int = 1,
        prompts: Sequence[str] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> StructureGuard:
        """A guard for `rows` sequences.

        prompts: text before the first token that belongs to the same text (a completion's prompt, not a
        chat's). prompt_ids: its tokens, of which the last few are kept.
        """
        tails = prompt_ids or [()] * rows
        texts = [TokenText(decode, list(ids)) for ids in tails]
        states = [StructureState() for _ in range(rows)]
        for state, prompt in zip(states, prompts or [""] * rows, strict=True):
            state.push(prompt)
        return cls(texts, states, [[] for _ in range(rows)])

    def push(self, tokens_B: Sequence[int]) -> list[bool]:
        """One token a row, about to be fed: True for rows whose step must not skip."""
        rows = zip(tokens_B, self.texts, self.states, self.kinds, strict=True)
        for token, text, state, kinds in rows:
            before = state.kind
            state.push(text.push(token))
            kinds.append(state.kind or before)
        return [kinds[-1] is not None for kinds in self.kinds]


# --- validators -------------------------------------------------------------------------------------

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+#-]*)([^`]*)")
_PAIRS = dict(zip(")]}）］｝】〕》〉」』", "([{（［｛【〔《〈「『", strict=True))
_UNREAD = re.compile(
    r'"(?:\\.|[^"\\\n])*"'  # a string on one line
    r"|'(?:\\.|[^'\\\n])'"  # one character in quotes
    r"|`[^`\n]*`"  # inline code
    r"|(?m:^[ \t]*\w{1,3}[)）])"  # a list's 1) or a)
    r"|(?<!\S)[:;]-?[()](?!\S)"  # a smiley
)


def check_brackets(text: str) -> str | None:
    """What is wrong with the brackets and code fences of `text`, prose or code, or None.

    Limit: it knows no language; a bracket in a regular expression or in a string over lines counts.
    """
    unclosed = [block for block in _code_blocks(text) if not block.closed]
    if unclosed:
        return f"the code fence in line {unclosed[0].line} is never closed"
    open_at: list[tuple[str, int]] = []
    readable = _UNREAD.sub(lambda found: " " * len(found[0]), text)
    line = 1
    for char in readable:
        line += char == "\n"
        if char in _PAIRS.values():
            open_at.append((char, line))
        elif char in _PAIRS:
            if not open_at:
                return f"the {char} in line {line} closes nothing"
            opener, at = open_at.pop()
            if opener != _PAIRS[char]:
                return f"the {char} in line {line} does not close the {opener} of line {at}"
    return f"the {open_at[-1][0]} of line {open_at[-1][1]} is never closed" if open_at else None


def check_json(text: str) -> str | None:
    """Why `text` is no JSON, or None. If it has code fences, each of them must hold JSON and the rest is prose."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    def problem(part: str) -> str | None:
        try:
            json.loads(part, parse_constant=refuse, parse_int=len)  # len: int() refuses long ones
        except RecursionError:
            return "the JSON is nested too deeply to be read"
        except ValueError as error:
            return f"this is no JSON: {error}"
        return None

    return _first_problem(text, ("", "json"), problem)


def check_python(text: str) -> str | None:
    """Why `text` is no Python, or None; nothing is run. If it has code fences, what they hold is read instead."""

    def problem(part: str) -> str | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # such as "\d" in a string: bad style, not bad syntax
                compile(part, "<text>", "exec", dont_inherit=True)
        except SyntaxError as error:
            where = f" (line {error.lineno})" if error.lineno else ""
            return f"this is no Python: {error.msg}{where}"
        except (MemoryError, RecursionError):
            return "the Python is nested too deeply to be read"
        except (ValueError, OverflowError) as error:  # such as an integer of five thousand digits
            return f"this is no Python: {error}"
        return None

    return _first_problem(text, ("", "py", "python", "python3"), problem)


VALIDATORS: dict[str, Validator] = {
    "brackets": check_brackets,
    "json": check_json,
    "python": check_python,
}


@dataclass(frozen=True, slots=True)
class _Block:
    language: str
    body: str
    line: int
    closed: bool


def _code_blocks(text: str) -> Iterator[_Block]:
    """The fenced code blocks of a text; the last may be unclosed."""
    mark, language, start, body = "", "", 0, []
    for number, line in enumerate(text.split("\n"), 1):
        if mark:
            shut = line.strip()
            if len(shut) >= len(mark) and not shut.strip(mark[0]):
                yield _Block(language, "\n".join(body), start, True)
                mark, body = "", []
            else:
                body.append(line)
        elif found := _FENCE.fullmatch(line):
            mark, language, start = found[1], found[2].lower(), number
    if mark:
        yield _Block(language, "\n".join(body), start, False)


def _first_problem(text: str, languages: Sequence[str], problem: Validator) -> str | None:
    blocks = list(_code_blocks(text))
    if not blocks:
        return problem(text)
    if not blocks[-1].closed:
        return f"the code fence in line {blocks[-1].line} is never closed"
    parts = [b.body for b in blocks if b.language in languages]
    if not parts:
        return f"no code fence holds {languages[1]}"
    return next((error for part in parts if (error := problem(part))), None)


# --- fallback ---------------------------------------------------------------------------------------


def tau_ladder(tau: float, reruns: int) -> tuple[float | None, ...]:
    """tau, then always half of the way to 1, and at last None, which is dense: reruns + 1 rungs."""
    stricter = [1 - (1 - tau) / 2**i for i in range(1, reruns)]
    return (tau, *stricter, None) if reruns else (tau,)


@dataclass(frozen=True, slots=True)
class Attempt(Generic[Setting, Made]):
    """One generation and what the validator said of it (None: it passed). flops: executed in decoding."""

    setting: Setting
    made: Made
    flops: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Fallback(Generic[Setting, Made]):
    """All attempts in their order. The kept one is the last: it passed, or no stricter setting was left."""

    attempts: tuple[Attempt[Setting, Made], ...]

    @property
    def kept(self) -> Attempt[Setting, Made]:
        return self.attempts[-1]

    @property
    def flops(self) -> int:
        """Executed by all attempts together."""
        return sum(attempt.flops for attempt in self.attempts)


def generate_with_fallback(
    generate: Callable[[Setting], tuple[Made, str, int]],
    settings: Iterable[Setting],
    validate: Validator,
) -> Fallback[Setting, Made]:
    """Generate with each setting in turn, loosest first, until a text passes.

    generate: what a setting makes, its text, and the FLOPs executed. Raises ValueError without a setting.
    """
    attempts: list[Attempt[Setting, Made]] = []
    for setting in settings:
        made, text, flops = generate(setting)
        attempts.append(Attempt(setting, made, flops, validate(text)))
        if attempts[-1].error is None:
            break
    if not attempts:
        raise ValueError("there is nothing to generate with; give at least one setting")
    return Fallback(tuple(attempts))


# --- counts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SafetyCounts:
    """What the guards did, over all attempts of one request or, added up, of many.

    tokens: fed to the model by decoding. protected: those of them that ran every layer for structure's sake,
    by kind. validator_failures: attempts that did not pass. reruns: attempts after a request's first.
    fallbacks: requests that kept another attempt than their first. unresolved: that kept a failed one.
    """

    tokens: int = 0
    protected: Counter[Structure] = field(default_factory=Counter)
    validator_failures: int = 0
    reruns: int = 0
    fallbacks: int = 0
    unresolved: int = 0

    @classmethod
    def of(
        cls, kinds: Iterable[Structure | None], errors: Sequence[str | None] = (None,)
    ) -> SafetyCounts:
        """Of one request. kinds: of all fed tokens, as a guard has them. errors: of its attempts."""
        tokens = Counter(kinds)
        failed = sum(error is not None for error in errors)
        again = len(errors) - 1
        return cls(
            tokens=tokens.total(),
            protected=Counter({kind: tokens[kind] for kind in Structure if tokens[kind]}),
            validator_failures=failed,
            reruns=again,
            fallbacks=int(again > 0),
            unresolved=int(errors[-1] is not None),
        )

    @property
    def protected_tokens(self) -> int:
        return self.protected.total()

    def __add__(self, other: SafetyCounts) -> SafetyCounts:
        return SafetyCounts(
            self.tokens + other.tokens,
            self.protected + other.protected,
            self.validator_failures + other.validator_failures,
            self.reruns + other.reruns,
            self.fallbacks + other.fallbacks,
            self.unresolved + other.unresolved,
        )

    def metrics(self) -> dict[str, float]:
        """By metric name; the share of protected tokens only where tokens were fed."""
        named: dict[str, float] = {
            "safety/tokens": self.tokens,
            "safety/protected_tokens": self.protected_tokens,
            **{f"safety/protected_{kind}_tokens": self.protected[kind] for kind in Structure},
            "safety/validator_failures": self.validator_failures,
            "safety/reruns": self.reruns,
            "safety/fallbacks": self.fallbacks,
            "safety/unresolved": self.unresolved,
        }
        if self.tokens:
            named["safety/protected_frac"] = self.protected_tokens / self.tokens
        return named
