"""Pictures of a PPO run from its metrics.jsonl, so that looking at one needs no account anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def draw_run(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write reward.png, skip_by_layer.png and gate_probability.png, as far as there is something to show."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    last = {record["train/step"]: record for record in records if "reward/total" in record}
    steps = [last[step] for step in sorted(last)]
    pictures: dict[str, Callable[[Any], bool]] = {
        "reward.png": lambda axes: _reward(axes, steps),
        "skip_by_layer.png": lambda axes: _skips(axes, steps),
        "gate_probability.png": lambda axes: _probabilities(axes, steps),
    }
    return [path for name, draw in pictures.items() if (path := _picture(folder / name, draw))]


def _picture(path: Path, draw: Callable[[Any], bool]) -> Path | None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    try:
        if not draw(axes):
            return None
        partial = path.with_name(f".{path.name}")
        figure.savefig(partial, dpi=120, format="png")
        os.replace(partial, path)
        return path
    finally:
        pyplot.close(figure)


def _reward(axes: Any, steps: Sequence[Record]) -> bool:
    x = [record["train/step"] for record in steps]
    for key in ("total", "compute_term", "quality_term"):
        axes.plot(x, [record[f"reward/{key}"] for record in steps], label=key.replace("_", " "))
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="mean over episodes", title="Reward and its terms")
    axes.legend()
    return bool(x)


def _skips(axes: Any, steps: Sequence[Record]) -> bool:
    layers = sorted(
        (key for key in (steps[-1] if steps else {}) if key.startswith("gate/skip_layer_")),
        key=lambda key: int(key.rsplit("_", 1)[1]),
    )
    if not layers:
        return False
    table = [[record.get(key, 0.0) for record in steps] for key in layers]
    shown = axes.imshow(table, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="Blues")
    axes.figure.colorbar(shown, ax=axes, label="share of tokens that skip")
    axes.set(xlabel="step", ylabel="layer", title="Skips by layer")
    return True


def _probabilities(axes: Any, steps: Sequence[Record]) -> bool:
    """The first and the last step's histogram of p over all decisions."""
    found = [record for record in steps if record.get("gate/prob_histogram")]
    for record in found[:1] + found[1:][-1:]:
        counts = record["gate/prob_histogram"]
        total, width = sum(counts) or 1, 1 / len(counts)
        edges = [i * width for i in range(len(counts) + 1)]
        axes.stairs([n / total for n in counts], edges, label=f"step {record['train/step']}")
    axes.set(xlabel="probability of skipping", ylabel="share of decisions", title="What the gates say")  # fmt: skip
    if found:
        axes.legend()
    return bool(found)
