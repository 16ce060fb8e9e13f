"""Engine-wide settings of the plugin: what `additional_config={"fbs": {...}}` may say."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fbs_rl.decode.kernel_source import MOST_ROWS


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """decode_path: "compact" drops rows that skip, "masked" has fixed shapes and no host decisions; "kernel" (CUDA):
    decode steps of up to the most of kernel_rows rows are one launch of the graph decoder's kernel, other steps as
    under "compact". kernel_rows: numbers of rows that a kernel is compiled for; what is between takes the next one.

    graphs (CUDA, with "masked"): "none"; "full": decode steps of up to graph_rows rows are CUDA graphs;
    "branches": graphs with an IF node a layer, which is not read where all rows skip it.
    native_gib: on a CPU decode steps of up to 32 rows are one call of compiled code, which needs the layers'
    weights as they were loaded beside those that vLLM packs; done where they take no more than this. 0: never.
    batch: "independent" gates, or "consensus": one decision for all rows of a step, by mean probability.
    trace_bytes, trace_s: how much and how long finished traces are kept for somebody to fetch them.
    stats_file: where counters go for /metrics (set by the plugin).
    """

    decode_path: str = "compact"
    graphs: str = "none"
    graph_rows: int = 16
    kernel_rows: tuple[int, ...] = (1, 2, 4, 8)
    batch: str = "independent"
    native_gib: float = 8.0
    trace_bytes: int = 256 << 20
    trace_s: float = 600.0
    stats_file: str = ""

    def __post_init__(self) -> None:
        _choose("decode_path", self.decode_path, ("compact", "masked", "kernel"))
        _choose("batch", self.batch, ("independent", "consensus"))
        _choose("graphs", self.graphs, ("none", "full", "branches"))
        for name in ("graph_rows", "trace_bytes", "trace_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"fbs.{name} is {getattr(self, name)}; give more than 0")
        rows = tuple(self.kernel_rows)
        if not rows or not all(isinstance(r, int) and 1 <= r <= MOST_ROWS for r in rows):
            raise ValueError(
                f"fbs.kernel_rows is {list(rows)}; give numbers of rows from 1 to {MOST_ROWS}, as in [1, 4]"
            )
        if not self.native_gib >= 0:
            raise ValueError(f"fbs.native_gib is {self.native_gib}; give 0 or more")
        if self.graphs != "none" and not self.masked:
            raise ValueError(
                f"fbs.graphs is {self.graphs!r}, which needs fixed shapes; set fbs.decode_path to masked"
            )

    @property
    def masked(self) -> bool:
        return self.decode_path == "masked"

    @property
    def consensus(self) -> bool:
        return self.batch == "consensus"

    @property
    def of_cuda(self) -> list[str]:
        """Names of the settings that ask for what only CUDA has."""
        asked = {"graphs": self.graphs != "none", "decode_path": self.decode_path == "kernel"}
        return [name for name, wanted in asked.items() if wanted]

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> ServingSettings:
        """Raises ValueError, in one sentence, for a name that does not exist or a value that cannot work."""
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = (
                    f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
                )
                raise ValueError(f"additional_config['fbs'] has no setting {name!r}{hint}")
        return cls(**given)

    @classmethod
    def of(cls, vllm_config: Any) -> ServingSettings:
        return cls.parse((vllm_config.additional_config or {}).get("fbs", {}))


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"fbs.{name} is {value!r}; it must be one of {', '.join(allowed)}")
