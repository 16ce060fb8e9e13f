"""What the manifest records of a preparation: inputs, what each filter removed, what is left, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fbs_rl.data.cleaning import CleanReport, too_many_malformed
from fbs_rl.data.document_encoder import DocumentEncoder
from fbs_rl.data.encoding import COVERAGE_UNIT, GroupReport
from fbs_rl.data.manifest import ShardEntry
from fbs_rl.data.packing import documents_of, labels_of
from fbs_rl.data.prepare_config import flat
from fbs_rl.data.prepare_plan import PreparePlan
from fbs_rl.data.selection import Selection
from fbs_rl.data.text_filters import Removal
from fbs_rl.types import BIOS, IGNORED_LABEL

LISTED_ROWS = 100
_EXAMPLES, _EXAMPLE_TOKENS = 3, 64


def check_malformed(plan: PreparePlan, reports: Mapping[int, CleanReport]) -> None:
    """ValueError if the units that are done hold more rows than the limit that could not be read."""
    if (
        sum(len(report.malformed) for report in reports.values())
        <= plan.config.rows.malformed_limit
    ):
        return
    number = max(number for number, report in reports.items() if report.malformed)
    piece, line, problem = reports[number].malformed[-1]
    unit = plan.units[number]
    raise too_many_malformed(unit.pieces[piece - unit.first_piece], line, problem, plan.config)


def nothing_left(reports: Sequence[CleanReport]) -> ValueError:
    """The error that says why no document came through."""
    reasons: dict[str, int] = {}
    for report in reports:
        for why, (documents, _) in report.removed.items():
            reasons[why] = reasons.get(why, 0) + documents
        reasons["malformed"] = reasons.get("malformed", 0) + len(report.malformed)
    told = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
    rows = sum(report.rows for report in reports)
    return ValueError(f"none of the {rows} rows is left: {told or 'the input is empty'}")


class Positions:
    """Turns (piece, line within the piece) into "file:line"."""

    def __init__(self, plan: PreparePlan, reports: Sequence[CleanReport]) -> None:
        names = {file.path: file.name for file in plan.files}
        lines = [count for report in reports for count in report.piece_lines]
        self._places: list[tuple[str, int]] = []
        before = 0
        pieces = [piece for unit in plan.units for piece in unit.pieces]
        for piece, count in zip(pieces, lines, strict=True):
            before = 0 if piece.start == 0 else before
            self._places.append((names[piece.path], before))
            before += count

    def name(self, piece: int, line: int) -> str:
        path, before = self._places[piece]
        return f"{path}:{before + line}"


def describe(
    plan: PreparePlan,
    reports: Sequence[CleanReport],
    selection: Selection,
    groups: Mapping[str, Sequence[tuple[str, GroupReport]]],
) -> dict[str, Any]:
    """The record of the whole preparation; the same whatever did the work."""
    positions = Positions(plan, reports)
    malformed = [
        f"{positions.name(piece, line)}: {problem}"
        for report in reports
        for piece, line, problem in report.malformed
    ]
    encoded = [report for split in groups.values() for _, report in split]
    chinese = sum(sum(report.coverage_histogram) for report in encoded)
    coverage = sum(report.coverage_sum for report in encoded)
    return {
        "config": dict(flat(plan.config)),
        "inputs": [
            {"name": f.name, "bytes": f.bytes, "fingerprint": f.fingerprint, "text_field": f.text_field}
            for f in plan.files
        ],
        "rows": sum(report.rows for report in reports),
        "text_bytes": sum(report.text_bytes for report in reports),
        "malformed": {"rows": len(malformed), "first": malformed[:LISTED_ROWS]},
        "removed": _removed(reports, selection),
        "removed_examples": _removed_examples(positions, reports, selection),
        "kept": _counts(selection.kept),
        "kept_by_language": {name: _counts(c) for name, c in selection.by_language.items()},
        "kept_by_source": {name or "(none)": _counts(c) for name, c in selection.by_source.items()},
        "benchmark_rows_too_short": plan.benchmarks.too_short if plan.benchmarks else 0,
        "signature_pairs_alike": selection.compared,
        "chunk_labels": {
            "chunks": sum(report.chunks for report in encoded),
            "idioms": sum(report.idioms for report in encoded),
            "documents_with_chinese": chinese,
            "mean_coverage": round(coverage / chinese / COVERAGE_UNIT, 6) if chinese else None,
            "documents_by_coverage_tenth": np.sum(
                [report.coverage_histogram for report in encoded], axis=0
            ).tolist() if encoded else [],
        },
    }  # fmt: skip


def _counts(pair: Sequence[int]) -> dict[str, int]:
    return {"documents": pair[0], "bytes": pair[1]}


def _removed(reports: Sequence[CleanReport], selection: Selection) -> dict[str, dict[str, int]]:
    totals = {why.value: [0, 0] for why in Removal}
    for removed in [*(report.removed for report in reports), selection.removed]:
        for why, (documents, size) in removed.items():
            totals[why][0] += documents
            totals[why][1] += size
    return {why: _counts(total) for why, total in totals.items()}


def _removed_examples(
    positions: Positions, reports: Sequence[CleanReport], selection: Selection
) -> dict[str, list[dict[str, Any]]]:
    examples: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        for why, found in report.examples.items():
            listed = examples.setdefault(why, [])
            for piece, line, text, detail in found[: _EXAMPLES - len(listed)]:
                entry = {"row": positions.name(piece, line), "text": text}
                listed.append(entry | ({"because_of": detail} if detail else {}))
    for why, pairs in selection.examples.items():
        examples[why] = [
            {"row": positions.name(*row), "because_of": positions.name(*other), "similarity": alike}
            for row, other, alike in pairs
        ]
    return {why: found for why, found in examples.items() if found}


def example_rows(
    out: Path, splits: Mapping[str, Sequence[ShardEntry]], encoder: DocumentEncoder
) -> list[dict[str, Any]]:
    """The start of the first training rows, in words, with a letter for each token's label ("." for none)."""
    if not splits["train"]:
        return []
    shard = splits["train"][0]
    ids, marks, measures = (np.load(out / file.name, mmap_mode="r") for file in shard.files)
    examples = []
    for row in range(min(_EXAMPLES, shard.sequences)):
        mark_1T = np.asarray(marks[row : row + 1, :_EXAMPLE_TOKENS])
        labels = labels_of(mark_1T)[0].tolist()
        examples.append(
            {
                "row": row,
                "text": encoder.decode(ids[row, :_EXAMPLE_TOKENS].tolist()),
                "ids": ids[row, :_EXAMPLE_TOKENS].tolist(),
                "labels": "".join("." if n == IGNORED_LABEL else BIOS[n] for n in labels),
                "documents": documents_of(mark_1T)[0].tolist(),
                "coverage": _number(measures[row, 0]),
                "chinese_frac": _number(measures[row, 1]),
            }
        )
    return examples


def _number(value: np.floating[Any]) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
