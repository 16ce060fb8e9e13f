"""Short questions, one a line, for pools that a test makes."""

from __future__ import annotations

import json
from pathlib import Path


def write_questions(path: Path, count: int = 40) -> Path:
    """A JSONL file of `count` questions."""
    rows = [
        {"id": f"q{i}", "prompt": f"The fox reads {i} words. It skips", "answer": f" {i % 7} words"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
