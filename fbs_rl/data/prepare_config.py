"""Settings of `python -m fbs_rl.data prepare`: one tree, from a YAML file and dotted overrides.

Only what changes the result is here. How the work is done (workers, Ray, progress) is not, so that the same
configuration gives the same bytes anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fbs_rl.config import load_settings

TEXT_FIELDS = ("text", "content", "raw_content", "body", "article", "document")
LANGUAGES = ("en", "zh", "mixed")
PLAIN_TEXT_SPLITS = ("file", "blank_line", "line")


@dataclass(frozen=True, slots=True)
class RowConfig:
    """How rows are read.

    text_fields: the first of these that a file has holds the text. source_field: field naming where a document
    comes from, for the counts and for filters.exclude_sources. plain_text_split: what is one document of a
    plain text file: the whole `file`, what stands between `blank_line`s, or each `line`. malformed_limit: rows
    that cannot be read are skipped up to this many, over all inputs. max_bytes: longest row read into memory.
    """

    text_fields: tuple[str, ...] = TEXT_FIELDS
    source_field: str = "source"
    plain_text_split: str = "file"
    malformed_limit: int = 100
    max_bytes: int = 2**26


@dataclass(frozen=True, slots=True)
class FilterConfig:
    """What is kept. Lengths are of the normalised text.

    languages: documents whose letters are at most 5 % Han are `en` (any script but Han, in truth), at least
    half Han `zh`, others `mixed`. exclude_sources: patterns such as "wmt*" on the source field.
    """

    min_chars: int = 200
    max_chars: int = 10_000_000
    languages: tuple[str, ...] = LANGUAGES
    exclude_sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NearDuplicateConfig:
    """MinHash. A shingle is this many consecutive words (Chinese documents: characters).

    threshold: Jaccard similarity of shingle sets from which two documents are the same; null: only exact
    duplicates are removed. permutations: length of a signature; the estimate's standard error at similarity J
    is at most sqrt(J(1-J)/permutations).
    """

    threshold: float | None = 0.8
    permutations: int = 128
    shingle_words: int = 5
    shingle_chars: int = 5


@dataclass(frozen=True, slots=True)
class DecontaminationConfig:
    """Benchmark files whose text must not be trained on: a document that shares a run of `ngram_words` words
    (Chinese: `ngram_chars` characters) with a row of them is removed."""

    files: tuple[str, ...] = ()
    ngram_words: int = 13
    ngram_chars: int = 13


@dataclass(frozen=True, slots=True)
class LabelConfig:
    """Chinese chunk labels. lexicon: file of idioms, one a line; null: the one that ships. min_chars,
    max_chars: length of a segment that becomes a chunk. min_han_frac: least share of Han in it."""

    lexicon: str | None = None
    min_chars: int = 2
    max_chars: int = 8
    min_han_frac: float = 0.5


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """The whole tree.

    tokenizer: hub id, folder, or the alias of the weights that the installation carries. shard_tokens: size of
    a shard, rounded up to whole sequences. heldout_frac: share of documents in the split `heldout`. seed:
    order of documents and choice of those held out.
    """

    tokenizer: str = "smollm2-135m"
    sequence_tokens: int = 2048
    shard_tokens: int = 2**25
    heldout_frac: float = 0.005
    seed: int = 0
    rows: RowConfig = field(default_factory=RowConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    near_duplicates: NearDuplicateConfig = field(default_factory=NearDuplicateConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)

    def validate(self) -> None:
        """ValueError, in one sentence, for values that cannot work, whatever the input."""
        rows, filters, near, labels = self.rows, self.filters, self.near_duplicates, self.labels
        ngrams = (self.decontamination.ngram_words, self.decontamination.ngram_chars)
        unknown = [name for name in filters.languages if name not in LANGUAGES]
        rules = [
            (self.sequence_tokens >= 8, f"sequence_tokens is {self.sequence_tokens}; give at least 8"),
            (self.shard_tokens >= 1, f"shard_tokens is {self.shard_tokens}; give at least 1"),
            (0 <= self.heldout_frac < 1, f"heldout_frac is {self.heldout_frac}; give a share in [0, 1)"),
            (0 <= self.seed < 2**63, f"seed is {self.seed}; give a number from 0 to 2^63 - 1"),
            (bool(rows.text_fields), "rows.text_fields is empty; name the field that holds the text"),
            (rows.plain_text_split in PLAIN_TEXT_SPLITS,
             f"rows.plain_text_split is {rows.plain_text_split!r}; choose from {', '.join(PLAIN_TEXT_SPLITS)}"),
            (rows.malformed_limit >= 0, f"rows.malformed_limit is {rows.malformed_limit}; give 0 or more"),
            (rows.max_bytes >= 1024, f"rows.max_bytes is {rows.max_bytes}; give at least 1024"),
            (1 <= filters.min_chars <= filters.max_chars,
             f"filters.min_chars and max_chars are {filters.min_chars} and {filters.max_chars}; "
             f"give 1 <= min_chars <= max_chars"),
            (not unknown, f"filters.languages has {unknown[:1]}; choose from {', '.join(LANGUAGES)}"),
            (bool(filters.languages), "filters.languages is empty; nothing would be kept"),
            (near.threshold is None or 0 < near.threshold <= 1,
             f"near_duplicates.threshold is {near.threshold}; give a similarity in (0, 1], or null for none"),
            (16 <= near.permutations <= 4096,
             f"near_duplicates.permutations is {near.permutations}; give 16 to 4096"),
            (min(near.shingle_words, near.shingle_chars) >= 1, "a shingle has at least 1 word or character"),
            (min(ngrams) >= 5, f"decontamination n-grams are {ngrams}; below 5, ordinary text would match"),
            (1 <= labels.min_chars <= labels.max_chars, "labels need 1 <= min_chars <= max_chars"),
            (0 <= labels.min_han_frac <= 1, f"labels.min_han_frac is {labels.min_han_frac}; give a share"),
        ]  # fmt: skip
        for holds, sentence in rules:
            if not holds:
                raise ValueError(sentence)

    @property
    def shard_rows(self) -> int:
        """Sequences in a shard."""
        return -(-self.shard_tokens // self.sequence_tokens)


def read_config(path: str | None, overrides: Sequence[str] = ()) -> PrepareConfig:
    """The configuration of a YAML file with `section.key=value` overrides on top, checked.

    Raises FileNotFoundError, or ValueError naming the nearest key for one that does not exist.
    """
    config = load_settings(PrepareConfig, path, overrides)
    config.validate()
    return config


def flat(config: PrepareConfig) -> Mapping[str, Any]:
    """The leaves by dotted key."""
    return dict(_leaves(asdict(config), ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
