"""The prompts of Stage 2: a pool of questions, split, in a fixed order, with an account of where it is from.

    python -m fbs_rl.rl.question_pool mmlu/val.jsonl cmmlu/dev --against mmlu/test.jsonl --out pool

Without a SOURCE the pool is made of the sample that ships with the package (samples/LICENCES.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fbs_rl.data.whole_files import write_whole
from fbs_rl.option_parser import OptionParser
from fbs_rl.rl.answer_format import AnswerFormat, GoldText, Heading, Turn, encode_question
from fbs_rl.rl.question_overlap import EvaluationIndex
from fbs_rl.rl.question_selection import Removal, Selection, select_questions
from fbs_rl.rl.questions import EncodedQuestion, Question, SourceQuestion
from fbs_rl.run_folder import RunFolder
from fbs_rl.seeds import stable_hash
from fbs_rl.training.order import DataOrder

MANIFEST, QUESTIONS = "manifest.json", "questions.jsonl"
FORMAT = 1
_SHOT_SPLIT = "dev"


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """How a pool is made of its sources.

    heldout_frac: share of questions that are kept for measuring. seed: of the split and of the order.
    malformed_limit: rows that may be no questions, over all sources. carve_out: "set/subject" of test splits
    that are trained on, and so are excluded from every evaluation.
    """

    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    heldout_frac: float = 0.05
    seed: int = 0
    malformed_limit: int = 100
    carve_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole = [name for name in self.carve_out if name.count("/") != 1]
        rules = [
            (0 <= self.heldout_frac < 1, f"heldout_frac is {self.heldout_frac}; give a share in [0, 1)"),
            (0 <= self.seed < 2**63, f"seed is {self.seed}; give a number from 0 to 2^63 - 1"),
            (self.malformed_limit >= 0, f"malformed_limit is {self.malformed_limit}; give 0 or more"),
            (not whole, f"the carve-out has {whole[:1]}; name SET/SUBJECT, such as cmmlu/agronomy"),
        ]  # fmt: skip
        for holds, sentence in rules:
            if not holds:
                raise ValueError(sentence)


@dataclass(frozen=True, slots=True)
class QuestionPool:
    """Questions to train on and to measure with, each ordered by id. manifest: JSON-able, says how it was made."""

    train: tuple[Question, ...]
    heldout: tuple[Question, ...]
    answer_format: AnswerFormat
    seed: int
    manifest: dict[str, Any]
    _order: DataOrder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [question.id for question in (*self.train, *self.heldout)]
        if not self.train:
            raise ValueError("the pool has no question to train on; add sources")
        if len(set(names)) < len(names):
            raise ValueError("two questions of the pool have the same id")
        object.__setattr__(self, "_order", DataOrder(len(self.train), self.seed))

    @property
    def digest(self) -> str:
        """sha256 over all questions and their split."""
        digest = hashlib.sha256()
        for line in self._lines():
            digest.update(line.encode())
        return digest.hexdigest()

    def batch(self, step: int, size: int) -> list[Question]:
        """The `size` training questions of a step, from 0: a function of pool, seed, step and size alone.

        Every epoch is shuffled anew and repeats none. A batch never joins two epochs, so that no question is
        in it twice; what is left over at the end of an epoch, fewer than `size`, waits for another one.
        ValueError for more questions than there are.
        """
        if not 1 <= size <= len(self.train):
            raise ValueError(
                f"{size} questions a step were asked for, but the pool has {len(self.train)} to train on; "
                f"give 1 to {len(self.train)}"
            )
        epoch, place = divmod(step, len(self.train) // size)
        first = epoch * len(self.train) + place * size
        return [self.train[number] for number in self._order.indices(first, size)]

    def encode(
        self, tokenizer: Any, max_prompt_tokens: int
    ) -> tuple[QuestionPool, dict[str, EncodedQuestion]]:
        """The pool without questions whose prompts are too long, and the ids of the others by question id.

        The manifest of the new pool counts what was dropped. ValueError if nothing is left to train on.
        """
        encoded: dict[str, EncodedQuestion] = {}
        for question in (*self.train, *self.heldout):
            found = encode_question(question, tokenizer, self.answer_format, max_prompt_tokens)
            if found is not None:
                encoded[question.id] = found
        train, heldout = (
            tuple(question for question in part if question.id in encoded)
            for part in (self.train, self.heldout)
        )
        if not train:
            raise ValueError(
                f"no prompt of the pool has at most {max_prompt_tokens} tokens; allow more of them"
            )
        removed = Counter(self.manifest["removed"])
        removed[Removal.TOO_LONG.value] += len(self.train) + len(self.heldout) - len(encoded)
        manifest = self.manifest | {
            "removed": dict(removed),
            "max_prompt_tokens": max_prompt_tokens,
        }
        return _described(replace(self, train=train, heldout=heldout, manifest=manifest)), encoded

    def write(self, folder: Path) -> None:
        """Write questions.jsonl and, last, manifest.json, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / QUESTIONS, "".join(self._lines()))
        write_whole(
            folder / MANIFEST, json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n"
        )

    @classmethod
    def read(cls, folder: Path) -> QuestionPool:
        """The pool in `folder`; FileNotFoundError or ValueError, in one sentence, if there is none to read."""
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} holds no pool of questions: it has no {MANIFEST}")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            text = (folder / QUESTIONS).read_text(encoding="utf-8")
            # Split on the newline only: str.splitlines would also cut at U+2028 inside a JSON string.
            rows = [json.loads(line) for line in text.split("\n") if line]
            parts = {"train": list[Question](), "heldout": list[Question]()}
            for row in rows:
                parts[row.pop("split")].append(Question(**row))
            stated = AnswerFormat(**_enums(manifest["answer_format"]))
            train, heldout = map(tuple, parts.values())
            pool = cls(train, heldout, stated, manifest["seed"], manifest)
            if manifest["format"] != FORMAT or pool.digest != manifest["digest"]:
                raise ValueError("its manifest describes other questions")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"the pool in {folder} cannot be used ({error}); make it again"
            ) from error
        return pool

    def _lines(self) -> Iterator[str]:
        for split, questions in (("train", self.train), ("heldout", self.heldout)):
            for question in questions:
                row = asdict(question) | {"split": split}
                yield json.dumps(row, ensure_ascii=False) + "\n"


def build_pool(
    sources: Sequence[str], evaluation_files: Sequence[str] = (), config: PoolConfig | None = None
) -> QuestionPool:
    """A pool of the questions in `sources`, none of which is in the `evaluation_files`.

    Both are files, folders, patterns or hf:OWNER/NAME[/PATTERN]. Which questions are held out depends on their
    text and the seed alone. Raises FileNotFoundError, OSError or ValueError, in one sentence.
    """
    config = config or PoolConfig()
    if not sources:
        raise ValueError("no source of questions was given; name files, folders or hf:OWNER/NAME")
    carve_out = frozenset(config.carve_out)
    evaluation = EvaluationIndex.read(evaluation_files, carve_out)
    selection = select_questions(sources, evaluation, carve_out, config.malformed_limit)
    missing = sorted(carve_out - selection.carved)
    if missing:
        raise ValueError(f"no source has a question of {missing[0]} in a test split to carve out")
    parts: dict[bool, list[Question]] = {True: [], False: []}
    shots = _Shots.of(selection.kept, config.answer_format)
    taken: set[str] = set()
    for question in selection.kept:
        made = config.answer_format.render(question, shots.before(question))
        if made.id in taken:  # the same name and place in two files
            made = replace(made, id=f"{made.id}~{question.key[:8]}")
        taken.add(made.id)
        draw = stable_hash("question split", config.seed, question.key) / 2**63
        parts[draw < config.heldout_frac].append(made)
    if not parts[False]:
        raise ValueError(f"no question is left to train on: {selection.account}")
    manifest = _manifest(config, selection, evaluation) | {"with_fewer_shots": shots.fewer}
    train, heldout = (tuple(sorted(parts[out], key=lambda q: q.id)) for out in (False, True))
    return _described(QuestionPool(train, heldout, config.answer_format, config.seed, manifest))


def default_pool(
    evaluation_files: Sequence[str] = (), config: PoolConfig | None = None
) -> QuestionPool:
    """The pool of the sample that ships with the package: MMLU in English, CMATH in Chinese.

    Limit: enough for tests and demonstrations, not the ten thousand questions of a real Stage 2.
    """
    return build_pool([str(Path(str(files("fbs_rl.rl") / "samples")))], evaluation_files, config)


@dataclass(slots=True)
class _Shots:
    """Solved examples by set and subject. fewer: questions that got fewer than were asked for."""

    wanted: int
    by_subject: dict[tuple[str, str], list[SourceQuestion]] = field(default_factory=dict)
    fewer: int = 0

    @classmethod
    def of(cls, questions: Iterable[SourceQuestion], answer_format: AnswerFormat) -> _Shots:
        shots = cls(answer_format.shots)
        for question in questions:
            if question.split == _SHOT_SPLIT and not question.verbatim:
                shots.by_subject.setdefault((question.source, question.subject), []).append(
                    question
                )
        if shots.wanted and not shots.by_subject:
            raise ValueError(
                f"{shots.wanted} shots were asked for, but no source has a {_SHOT_SPLIT} split; add it or ask for 0"
            )
        return shots

    def before(self, question: SourceQuestion) -> list[SourceQuestion]:
        """Those of its subject, in file order, without the question itself."""
        known = self.by_subject.get((question.source, question.subject), [])
        found = [shot for shot in known if shot is not question][: self.wanted]
        self.fewer += len(found) < self.wanted and not question.verbatim
        return found


def _manifest(
    config: PoolConfig, selection: Selection, evaluation: EvaluationIndex
) -> dict[str, Any]:
    licences: dict[str, list[str | None]] = {}
    for question in selection.kept:
        known = licences.setdefault(question.source, [])
        if (question.licence or None) not in known:
            known.append(question.licence or None)
    return {
        "format": FORMAT,
        "seed": config.seed,
        "heldout_frac": config.heldout_frac,
        "answer_format": asdict(config.answer_format),
        "carve_out": list(config.carve_out),
        "sources": [asdict(source) for source in selection.sources],
        "licences": licences,
        "evaluation": {
            "files": [asdict(file) for file in evaluation.files],
            "rows_only_matched_whole": evaluation.runs.too_short,
        },
        "rows": selection.counts.rows,
        "malformed": selection.counts.malformed,
        "malformed_examples": selection.counts.examples,
        "removed": dict(selection.removed),
        "removed_examples": selection.examples,
    }


def _described(pool: QuestionPool) -> QuestionPool:
    """The pool with what its manifest says of its questions brought up to date."""
    everything = (*pool.train, *pool.heldout)
    manifest = pool.manifest | {
        "questions": {
            "train": len(pool.train),
            "heldout": len(pool.heldout),
            "by_language": dict(Counter(question.language for question in everything)),
            "by_source": dict(Counter(question.source for question in everything)),
        },
        "examples": [asdict(question) for question in pool.train[:3]],
        "digest": pool.digest,
    }
    return replace(pool, manifest=manifest)


def _enums(stated: dict[str, Any]) -> dict[str, Any]:
    kinds = {"gold": GoldText, "turn": Turn, "heading": Heading}
    return {name: kinds[name](value) if name in kinds else value for name, value in stated.items()}


# --- the command ------------------------------------------------------------------------------------


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="python -m fbs_rl.rl.question_pool",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words = "file (.csv, .jsonl, .parquet), folder, pattern, or hf:OWNER/NAME[/PATTERN]"
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=words)
    against = "evaluation files, folders or patterns whose questions must not be in the pool"
    parser.add_argument(
        "--against", nargs="+", action="extend", default=[], metavar="FILE", help=against
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="an empty or new folder")
    gold = "option: letter and text (default); letter; text"
    parser.add_argument("--gold", choices=list(GoldText), default=GoldText.OPTION, help=gold)
    turn = "completion (default), or chat: through the tokenizer's template"
    parser.add_argument("--turn", choices=list(Turn), default=Turn.COMPLETION, help=turn)
    heading = "the sentence above the question: harness (default) or none"
    parser.add_argument("--heading", choices=list(Heading), default=Heading.HARNESS, help=heading)
    parser.add_argument("--shots", type=int, default=0, metavar="K", help="from dev; default 0")
    frac = "share kept for measuring; default 0.05"
    parser.add_argument("--heldout-frac", type=float, default=0.05, metavar="X", help=frac)
    parser.add_argument("--seed", type=int, default=0, help="of split and order; default 0")
    parser.add_argument("--malformed-limit", type=int, default=100, metavar="N", help="default 100")
    carve = "subject of a test split to train on, and to leave out of every evaluation"
    parser.add_argument(
        "--carve-out", nargs="+", action="extend", default=[], metavar="SET/SUBJECT", help=carve
    )
    return parser


def _report(pool: QuestionPool) -> Iterator[str]:
    """What the command prints."""
    said = pool.manifest
    for source in said["sources"]:
        yield f"{source['name']}: {source['kept']} of {source['rows']} rows kept"
    yield from (f"removed, {reason}: {count}" for reason, count in said["removed"].items())
    if said["malformed"]:
        yield f"malformed: {said['malformed']}, first {said['malformed_examples'][0]}"
    if not said["evaluation"]["files"]:
        yield "not compared with any evaluation file (--against)"
    counts = said["questions"]
    languages = ", ".join(f"{name} {count}" for name, count in counts["by_language"].items())
    yield f"pool: {counts['train']} to train on, {counts['heldout']} held out ({languages})"
    yield f"digest: {said['digest']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one sentence on standard error for what a user can put right."""
    try:
        options = _parser().parse_args(argv)
        folder = RunFolder.plan("questions", options.out).path
        config = PoolConfig(
            AnswerFormat(
                GoldText(options.gold), Turn(options.turn), Heading(options.heading), options.shots
            ),
            options.heldout_frac,
            options.seed,
            options.malformed_limit,
            tuple(options.carve_out),
        )
        if options.sources:
            pool = build_pool(options.sources, options.against, config)
        else:
            pool = default_pool(options.against, config)
        pool.write(folder)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print("\n".join([*_report(pool), f"written: {folder}/{QUESTIONS}, {folder}/{MANIFEST}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
