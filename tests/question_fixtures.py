"""Small files in the layouts that benchmarks are published in."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

QUESTION = "Which organ, of those listed,\nis in the thorax?"
OPTIONS = ["Liver", "Lung, left", "Kidney", 'The "colon"']
ZH_QUESTION = "下列鸭品种中，产蛋量最高的品种是____。"
ZH_OPTIONS = ["高邮鸭", "北京鸭", "樱桃谷鸭", "绍鸭"]


def write_csv(path: Path, rows: Iterable[Sequence[object]], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    return path


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def many(count: int, **more: object) -> list[dict[str, Any]]:
    """Questions that have no run of 13 words in common."""
    return [
        {"question": f"What is {n} plus {n + 1}?", "choices": [str(n), str(2 * n + 1)], "answer": "B"}
        | more
        for n in range(count)
    ]  # fmt: skip
