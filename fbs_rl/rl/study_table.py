"""The answer of a policy study in Markdown: arms by skip ratio, seeds as mean and range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
_REFERENCE_OF = {"no-RL": "no-RL", "no-RL drawn": "no-RL drawn", "PPO drawn": "no-RL drawn"}
_SIGNED = ("dnll", "reward", "reverse_kl")


def reference_of(arm: str) -> str:
    """The no-RL arm that `arm` is compared with at equal skip."""
    return _REFERENCE_OF.get(arm, "no-RL")


def study_tables(rows: Iterable[Row]) -> str:
    """Three tables for each configuration: at equal measured skip, where policies stand, what gated models write."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:  # a study that was started again says some things twice
        key = tuple(row.get(n) for n in ("kind", "config", "seed", "step", "arm", "asked"))
        newest[key] = row
    kept = list(newest.values())
    parts = []
    for config in _distinct(row["config"] for row in kept):
        mine = [row for row in kept if row["config"] == config]
        parts += [
            _equal_skip(config, mine),
            _own_points(config, mine),
            _own_texts(config, mine),
            *_stops(mine),
        ]
    return "\n\n".join(part for part in parts if part)


def _equal_skip(config: str, rows: Sequence[Row]) -> str:
    def cells(same: Sequence[Row]) -> list[str]:
        arm = same[0]["arm"]
        names = ("dnll_gold", "dnll_self", "reward")
        against = reference_of(arm) != arm
        return [
            f"{same[0]['asked']:.0%}",
            arm,
            str(len(same)),
            _spread(same, "flops_frac", 3),
            *(_spread(same, name, 4) for name in names),
            *(_difference(same, name) if against else "" for name in ("dnll_gold", "reward")),
        ]

    return _table(
        f"{config}, held-out questions at equal measured skip: mean over seeds (lowest to highest); differences to the "
        f"no-RL gate of the same kind with the widest 95 % interval of any seed",
        "skip | arm | seeds | FLOPs | dNLL gold | dNLL self | reward | dNLL gold − no-RL | reward − no-RL",
        [row for row in rows if row["kind"] == "equal"],
        ("asked", "arm"),
        cells,
    )


def _own_points(config: str, rows: Sequence[Row]) -> str:
    def cells(same: Sequence[Row]) -> list[str]:
        names = ("skip", "flops_frac", "dnll_gold", "dnll_self", "reward")
        said = [str(same[0]["step"]), same[0]["arm"], same[0]["asked"], str(len(same))]
        return [*said, *(_spread(same, name, 4) for name in names)]

    return _table(
        f"{config}, policies as they stand",
        "updates | arm | set to | seeds | skip | FLOPs | dNLL gold | dNLL self | reward",
        [row for row in rows if row["kind"] == "point" and isinstance(row["asked"], str)],
        ("step", "arm", "asked"),
        cells,
    )


def _own_texts(config: str, rows: Sequence[Row]) -> str:
    def cells(same: Sequence[Row]) -> list[str]:
        names = {"skip": 4, "tokens": 1, "nll_gated": 4, "nll_dense": 4, "reverse_kl": 4}
        said = [f"{same[0]['asked']:.0%}", same[0]["arm"], str(len(same))]
        numbers = (_spread(same, name, digits) for name, digits in names.items())
        return [*said, *numbers, _difference(same, "reverse_kl")]

    return _table(
        f"{config}, text that the gated model writes for held-out questions, tokens drawn at temperature 1, thresholds "
        f"set for a skip ratio on the other questions; nats a token; reverse KL: mean of log p gated − log p dense",
        "set for | arm | seeds | skip | tokens | NLL gated | NLL dense | reverse KL | reverse KL − no-RL",
        [row for row in rows if row["kind"] == "own"],
        ("asked", "arm"),
        cells,
    )


def _table(
    title: str, header: str, rows: Sequence[Row], by: Sequence[str], cells: Callable[[list[Row]], list[str]]
) -> str:  # fmt: skip
    """A line for the rows, one a seed, that agree in `by`, in the order of the first of these; "" without rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    lines = [title, "", f"| {header} |", "|" + "---|" * len(header.split(" | "))]
    for key in sorted(groups, key=lambda key: key[0]):
        lines.append(f"| {' | '.join(cells(groups[key]))} |")
    return "\n".join(lines) if groups else ""


def _stops(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['config']}, seed {row['seed']}: stopped after {row['step']} updates: {row['reason']}"
        for row in rows
        if row["kind"] == "stopped"
    ]


def _spread(rows: Sequence[Row], name: str, digits: int) -> str:
    values = [row[name] for row in rows]
    mean, low, high = sum(values) / len(values), min(values), max(values)
    text = f"{mean:+.{digits}f}" if name.startswith(_SIGNED) else f"{mean:.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _difference(rows: Sequence[Row], name: str) -> str:
    found = [row["minus_no_rl"][name] for row in rows if row.get("minus_no_rl")]
    if not found:
        return ""
    mean = sum(each[0] for each in found) / len(found)
    low, high = min(each[1] for each in found), max(each[2] for each in found)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


Emit = Callable[[Row], None]
"""What is told each row as it is found."""
