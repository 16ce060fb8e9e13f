"""Stage 2: which documents stay, in which split, in which order; the one stage that sees all of them.

Memory: about 110 bytes for each document that passed stage 1 (digests, then band keys, are held for all at
once; signatures are looked up on disk), and no text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fbs_rl.data.cleaning import RECORD, CleanReport
from fbs_rl.data.manifest import SPLITS
from fbs_rl.data.near_duplicates import Clusters, join_similar
from fbs_rl.data.prepare_config import LANGUAGES, PrepareConfig
from fbs_rl.data.text_filters import Removal
from fbs_rl.data.whole_files import whole_file, write_whole

PLACE = np.dtype([("unit", "<u4"), ("bytes", "<u4"), ("offset", "<u8")])
"""Where a document's text is: which unit's text file, and where in it."""
_EXAMPLES = 3


@dataclass(slots=True)
class Selection:
    """What stage 2 decided. groups: split -> [first, last) of each group among the split's places. volumes:
    their bytes of text.

    removed: reason -> [documents, bytes]. kept, by source, by language: [documents, bytes]. examples: reason ->
    [place, kept place, similarity], a place being (piece, line within it). compared: pairs of signatures.
    """

    groups: dict[str, list[tuple[int, int]]]
    volumes: dict[str, list[int]]
    kept: list[int]
    removed: dict[str, list[int]]
    by_source: dict[str, list[int]]
    by_language: dict[str, list[int]]
    compared: int = 0
    examples: dict[str, list[tuple[list[int], list[int], float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Selection:
        return cls(**json.loads((folder / "selection.json").read_text(encoding="utf-8")))


class Documents:
    """The records of all units, by number in input order; fields are read from disk when asked for."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets
        sizes = [Path(f"{target}.records").stat().st_size // RECORD.itemsize for target in targets]
        self.first = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.first[-1])

    def column(self, name: str) -> np.ndarray:
        """One field of all documents, in memory."""
        # Copies: a view of one field would keep the whole records in memory.
        return np.concatenate(
            [np.fromfile(f"{target}.records", RECORD)[name].copy() for target in self._targets]
        )

    def record(self, number: int) -> np.void:
        unit = self.unit_of(np.array([number]))[0]
        place = int(number - self.first[unit]) * RECORD.itemsize
        return np.fromfile(f"{self._targets[unit]}.records", RECORD, 1, offset=place)[0]

    def unit_of(self, numbers: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.first, numbers, side="right") - 1

    def band(self, band: int) -> np.ndarray:
        """uint64 keys of one band, of all documents."""
        keys = []
        for unit, target in enumerate(self._targets):
            count = int(self.first[unit + 1] - self.first[unit])
            start = band * count * 8
            keys.append(np.fromfile(f"{target}.bands", np.uint64, count, offset=start))
        return np.concatenate(keys)

    @property
    def bands(self) -> int:
        """How many bands there are."""
        for unit, target in enumerate(self._targets):
            count = int(self.first[unit + 1] - self.first[unit])
            if count:
                return Path(f"{target}.bands").stat().st_size // (8 * count)
        return 0

    def similarity(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Estimated Jaccard similarity of pairs of documents."""
        return (self._signature(one) == self._signature(other)).mean(axis=1)

    def _signature(self, numbers: np.ndarray) -> np.ndarray:
        units = self.unit_of(numbers)
        rows: np.ndarray | None = None
        for unit in np.unique(units):
            # Opened anew each time: a map keeps a file descriptor, and there may be thousands of units.
            stored = np.memmap(f"{self._targets[unit]}.signatures", np.uint32, "r")
            here = units == unit
            count = int(self.first[unit + 1] - self.first[unit])
            found = stored.reshape(count, -1)[numbers[here] - self.first[unit]]
            if rows is None:
                rows = np.empty((len(numbers), found.shape[1]), np.uint32)
            rows[here] = found
        assert rows is not None
        return rows


def select(
    targets: Sequence[str],
    reports: Sequence[CleanReport],
    config: PrepareConfig,
    folder: Path,
    group_bytes: int,
    advance: Callable[[int], None],
) -> Selection:
    """Decide, and write the places of each split to `folder`.

    targets: where stage 1 put the files of each unit, in input order. group_bytes: text that one task of stage
    3 encodes; nothing in the result depends on it. `advance` hears how many documents' worth is done.
    """
    documents = Documents(targets)
    sizes = documents.column("bytes").astype(np.int64)
    kept = np.ones(len(documents), bool)
    removed: dict[str, list[int]] = {}
    examples: dict[str, list[tuple[list[int], list[int], float]]] = {}

    def remove(why: Removal, first_of: np.ndarray) -> None:
        gone = np.flatnonzero(kept & (first_of != np.arange(len(documents))))
        removed[why.value] = [len(gone), int(sizes[gone].sum())]
        examples[why.value] = _examples(documents, gone[:_EXAMPLES], first_of, why)
        kept[gone] = False

    remove(Removal.EXACT_DUPLICATE, first_copies(documents.column("digest")))
    compared = 0
    if config.near_duplicates.threshold is not None and len(documents):
        clusters = Clusters(len(documents))
        listed = np.flatnonzero(kept & documents.column("listed"))
        for band in range(documents.bands):
            keys = documents.band(band)[listed]
            threshold = config.near_duplicates.threshold
            compared += join_similar(clusters, keys, listed, documents.similarity, threshold)
            advance(len(documents) // documents.bands)
        remove(Removal.NEAR_DUPLICATE, clusters.first_of(np.arange(len(documents))))

    numbers = np.flatnonzero(kept)
    groups, volumes = _arrange(documents, numbers, sizes, config, folder, group_bytes)
    selection = Selection(
        groups=groups,
        volumes=volumes,
        kept=[len(numbers), int(sizes[numbers].sum())],
        removed=removed,
        by_source=_by_source(documents, numbers, sizes, reports),
        by_language=_by_language(documents, numbers, sizes),
        compared=compared,
        examples=examples,
    )
    write_whole(folder / "selection.json", json.dumps(asdict(selection), ensure_ascii=False))
    return selection


def _arrange(
    documents: Documents,
    numbers: np.ndarray,
    sizes: np.ndarray,
    config: PrepareConfig,
    folder: Path,
    group_bytes: int,
) -> tuple[dict[str, list[tuple[int, int]]], dict[str, list[int]]]:
    """Divide the kept documents into splits, order them, write their places; groups and their bytes."""
    heldout = documents.column("split")[numbers] < np.uint64(config.heldout_frac * 2**64)
    order = documents.column("order")
    groups: dict[str, list[tuple[int, int]]] = {}
    volumes: dict[str, list[int]] = {}
    for split, members in zip(SPLITS, (numbers[~heldout], numbers[heldout]), strict=True):
        ordered = members[np.argsort(order[members], kind="stable")]
        _write_places(documents, ordered, folder / f"{split}.places")
        groups[split] = list(_groups(sizes[ordered], group_bytes))
        volumes[split] = [int(sizes[ordered[a:b]].sum()) for a, b in groups[split]]
    return groups, volumes


def first_copies(digest_D2: np.ndarray) -> np.ndarray:
    """For each document, in input order, the first one with the same digest."""
    order = np.lexsort((digest_D2[:, 1], digest_D2[:, 0]))  # stable: equal digests stay in order
    sorted_D2 = digest_D2[order]
    opens = np.append(True, (sorted_D2[1:] != sorted_D2[:-1]).any(axis=1))[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(opens)[np.cumsum(opens) - 1]] if len(order) else order
    return first


def _examples(
    documents: Documents, gone: np.ndarray, first_of: np.ndarray, why: Removal
) -> list[tuple[list[int], list[int], float]]:
    def place(number: int) -> list[int]:
        record = documents.record(number)
        return [int(record["piece"]), int(record["line"])]

    made = []
    for number in gone.tolist():
        other = int(first_of[number])
        pair = (np.array([number]), np.array([other]))
        near = why is Removal.NEAR_DUPLICATE
        alike = round(float(documents.similarity(*pair)[0]), 4) if near else 1.0
        made.append((place(number), place(other), alike))
    return made


def _write_places(documents: Documents, ordered: np.ndarray, path: Path) -> None:
    places = np.empty(len(ordered), PLACE)
    places["unit"] = documents.unit_of(ordered)
    for name in ("bytes", "offset"):
        places[name] = documents.column(name)[ordered]
    with whole_file(path) as file:
        file.write(places.tobytes())


def _groups(sizes: np.ndarray, group_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs of documents that hold about `group_bytes`."""
    number = (np.cumsum(sizes) - sizes) // group_bytes
    bounds = np.flatnonzero(np.diff(number, prepend=-1))
    return itertools.pairwise([*bounds.tolist(), len(sizes)])


def _by_source(
    documents: Documents, numbers: np.ndarray, sizes: np.ndarray, reports: Sequence[CleanReport]
) -> dict[str, list[int]]:
    sources, units = documents.column("source")[numbers], documents.unit_of(numbers)
    totals: dict[str, list[int]] = {}
    for unit, report in enumerate(reports):
        here = np.flatnonzero(units == unit)
        counts = np.bincount(sources[here], minlength=len(report.sources))
        volumes = np.bincount(sources[here], sizes[numbers[here]], len(report.sources))
        for name, count, volume in zip(report.sources, counts, volumes, strict=True):
            total = totals.setdefault(name, [0, 0])
            total[0] += int(count)
            total[1] += int(volume)
    return {name: total for name, total in sorted(totals.items()) if total[0]}


def _by_language(
    documents: Documents, numbers: np.ndarray, sizes: np.ndarray
) -> dict[str, list[int]]:
    languages = documents.column("language")[numbers]
    return {
        name: [int((languages == code).sum()), int(sizes[numbers[languages == code]].sum())]
        for code, name in enumerate(LANGUAGES)
    }
