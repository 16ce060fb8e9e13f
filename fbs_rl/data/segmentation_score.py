"""How well and how fast the Chinese labels are made, in one process:

    python -m fbs_rl.data.segmentation_score f1 GOLD_FILE ...
    python -m fbs_rl.data.segmentation_score speed TEXT_FILE --tokenizer smollm2-135m

f1 compares words with a gold segmentation: JSON lines with a list `words` (.jsonl, .jsonl.gz), or lines of
words between spaces (any other name, the format of SIGHAN 2005). speed labels documents: JSON lines with a
`text`. Sizes are of UTF-8 text, 1 MB = 10^6 bytes; times are of the processor.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fbs_rl.data.chunk_labels import ChunkLabeller, Spans, override
from fbs_rl.data.idioms import load_lexicon
from fbs_rl.data.segmenter import load_segmenter, segment
from fbs_rl.types import BIOS


@dataclass(frozen=True, slots=True)
class WordScore:
    """Counts of words: in the gold segmentation, found, and found with exactly the gold characters."""

    gold: int
    found: int
    correct: int

    @property
    def precision(self) -> float:
        return self.correct / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 0 where nothing is correct."""
        both = self.gold + self.found
        return 2 * self.correct / both if both else 0.0


def score_words(gold: Sequence[Spans], found: Sequence[Spans]) -> WordScore:
    """Counts over texts: a word is correct if its first and last character are those of a gold word."""
    correct = sum(len(set(a) & set(b)) for a, b in zip(gold, found, strict=True))
    return WordScore(sum(map(len, gold)), sum(map(len, found)), correct)


def word_spans(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where the words are in their concatenation."""
    spans: list[tuple[int, int]] = []
    place = 0
    for word in words:
        spans.append((place, place + len(word)))
        place += len(word)
    return spans


def read_gold(path: Path) -> list[list[str]]:
    """The words of each line of a gold segmentation.

    Raises FileNotFoundError, or ValueError for a file in neither format or without words.
    """
    if ".jsonl" in path.suffixes:
        gold: list[list[str]] = [row.get("words", []) for row in _read_rows(path)]
        if not all(isinstance(words, list) for words in gold):
            raise ValueError(f"{path}: the `words` of each line must be a list")
    else:
        gold = [line.split() for line in _read_lines(path)]
    if not any(gold):
        raise ValueError(f"{path} holds no words")
    return gold


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "f1":
            for path in arguments.gold_file:
                _report_f1(path, arguments.lexicon)
        else:
            _report_speed(
                arguments.text_file, arguments.tokenizer, arguments.lexicon, arguments.documents
            )
    except (ValueError, OSError) as error:
        print(f"segmentation_score: {error}", file=sys.stderr)
        return 2
    print(
        f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )
    return 0


def _report_f1(path: Path, lexicon_path: str | None) -> None:
    gold = read_gold(path)
    texts = ["".join(words) for words in gold]
    lexicon = load_lexicon(lexicon_path)
    load_segmenter()
    start = time.process_time()
    found = [segment(text) for text in texts]
    segmenting = time.process_time() - start
    idioms = [lexicon.find(text) for text in texts]
    searching = time.process_time() - start - segmenting
    overridden = [
        [(chunk.start, chunk.end) for chunk in override(words, listed)]
        for words, listed in zip(found, idioms, strict=True)
    ]
    print(f"{path.name}: {len(gold)} lines, {_megabytes(texts):.2f} MB")
    spans = [word_spans(words) for words in gold]
    for name, candidate in (("words", found), ("words and idioms", overridden)):
        score = score_words(spans, candidate)
        print(
            f"  {name:17} F1 {score.f1:.4f}  precision {score.precision:.4f}  recall {score.recall:.4f}"
            f"  ({score.found} found, {score.gold} gold)"
        )
    print(
        f"  {sum(map(len, idioms))} idioms; words {_megabytes(texts) / segmenting:.3f} MB/s, "
        f"idioms {_megabytes(texts) / searching:.1f} MB/s"
    )


def _report_speed(path: Path, tokenizer_name: str, lexicon: str | None, documents: int) -> None:
    texts = [str(row.get("text", "")) for row in islice(_read_rows(path), documents)]
    if not any(texts):
        raise ValueError(f"{path} holds no documents; give JSON lines with a `text`")
    tokenizer = _load_tokenizer(tokenizer_name)
    labeller = ChunkLabeller(lexicon=lexicon)
    labeller.chunks("语言模型")  # loads the segmenter and the lexicon
    start = time.process_time()
    offsets = [
        np.array(
            tokenizer(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
        )
        for text in texts
    ]
    tokenizing = time.process_time() - start
    labelled = [labeller.label(text, of) for text, of in zip(texts, offsets, strict=True)]
    labelling = time.process_time() - start - tokenizing
    size, tokens = _megabytes(texts), sum(map(len, offsets))
    shares = Counter(int(label) for row in labelled for label in row.labels_T)
    print(f"{path.name}: {len(texts)} documents, {size:.2f} MB, {tokens} tokens")
    print(
        f"  labels {size / labelling:.3f} MB/s ({tokens / labelling:.0f} tokens/s), "
        f"tokenizer {size / tokenizing:.2f} MB/s"
    )
    print(
        "  tokens: "
        + ", ".join(f"{name} {shares[i] / tokens:.3f}" for i, name in enumerate(BIOS))
        + f"; {sum(row.chunk_count for row in labelled)} chunks, {sum(row.idiom_count for row in labelled)} idioms"
    )
    covered = [row.coverage for row in labelled if not np.isnan(row.coverage)]
    if covered:
        print(
            f"  coverage of a document: mean {statistics.mean(covered):.3f}, median {statistics.median(covered):.3f}"
        )


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from fbs_rl.model.backbone import ModelSource

    source = ModelSource.parse_tokenizer(name)
    tokenizer = AutoTokenizer.from_pretrained(source.name, gguf_file=source.gguf_file)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: labels need a fast tokenizer, which knows the characters of a token"
        )
    return tokenizer


def _megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6


def _read_lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        # Not by str.splitlines, which would also cut at U+2028 inside a text.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object")
        yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fbs_rl.data.segmentation_score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    f1 = commands.add_parser("f1", help="precision, recall and F1 of words against a gold file")
    f1.add_argument("gold_file", nargs="+", type=Path)
    speed = commands.add_parser("speed", help="throughput of labels")
    speed.add_argument("text_file", type=Path)
    speed.add_argument(
        "--tokenizer", required=True, help="hub id, folder, .gguf file or smollm2-135m"
    )
    speed.add_argument("--documents", type=int, default=500, help="how many documents (500)")
    for command in (f1, speed):
        command.add_argument("--lexicon", help="idiom list, one a line (the one that ships)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
