"""Real English and Chinese documents that ship with the package.

Sources, authors and licences are in samples/LICENCES.md beside the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

LANGUAGES = ("en", "zh")
SPLITS = ("train", "heldout")


@dataclass(frozen=True, slots=True)
class SampleDocument:
    """One piece of a document, 1500 to 6000 characters, cut at a paragraph end."""

    text: str
    source: str
    title: str
    licence: str
    split: str
    lang: str


def load_sample(lang: str, split: str) -> list[SampleDocument]:
    """Documents of one language and split, in file order.

    Raises ValueError when `lang` is not in LANGUAGES or `split` not in SPLITS. No source document
    (novel, speech, proposal, manual chapter) is on both sides, so a model fitted on "train" has
    not seen the text of "heldout".

    Limit: large enough for tests, demonstrations and calibration, not for pretraining.
    """
    if lang not in LANGUAGES:
        raise ValueError(f"lang must be one of {', '.join(LANGUAGES)}; got {lang!r}.")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    path = files("fbs_rl.data") / "samples" / f"{lang}.jsonl"
    # Split on the newline only: str.splitlines would also cut at U+2028 inside a JSON string.
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return [SampleDocument(**row, lang=lang) for row in rows if row["split"] == split]
