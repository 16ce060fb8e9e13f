"""Counts of what the gates save, from the process that runs the model to the one that answers /metrics.

The worker writes float64 values into a small mapped file, the API process on the same host reads it at each
scrape. One writer, no locks: a value is written whole, but a reader may see a step's values half updated.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fbs_rl.decode.safety import SafetyCounts

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

_MAGIC = b"FBSSTEP1"  # eight bytes, so that the values behind it are aligned


class StatKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class StatField:
    """One value of the file, and how it is described at /metrics."""

    name: str
    kind: StatKind
    help: str


FIELDS = (
    StatField("decode_tokens", StatKind.COUNTER, "Tokens fed while gates could act."),
    StatField("decode_layer_tokens", StatKind.COUNTER, "Those tokens times the layers."),
    StatField("skipped_layer_tokens", StatKind.COUNTER, "Layers that those tokens skipped, summed."),
    StatField("executed_flops", StatKind.COUNTER, "FLOPs of matrix products executed in decoding."),
    StatField("dense_flops", StatKind.COUNTER, "FLOPs that decoding without skipping would have taken."),
    StatField("protected_tokens", StatKind.COUNTER, "Tokens that ran every layer for structure's sake."),
    StatField("replayed_tokens", StatKind.COUNTER, "Tokens computed again after a preemption."),
    StatField("traces_dropped", StatKind.COUNTER, "Finished traces that nobody took in time."),
    StatField("gate_version", StatKind.GAUGE, "Version of the gates in force."),
    StatField("gate_updates", StatKind.COUNTER, "Gate bundles applied."),
    StatField("layers_entered", StatKind.COUNTER, "Steps times layers that at least one row ran."),
    StatField("layers_skipped_whole", StatKind.COUNTER, "Steps times layers that no row ran."),
)  # fmt: skip
_PLACE = {stat.name: i for i, stat in enumerate(FIELDS)}
_RATIOS = (
    ("skip_ratio", "skipped_layer_tokens", "decode_layer_tokens", "Share of layers skipped in decoding."),
    ("executed_flops_ratio", "executed_flops", "dense_flops", "Executed FLOPs over those without skipping."),
)  # fmt: skip


class StepStats:
    """The values of one worker, all 0 at first. Counters only grow; a worker that starts again begins at 0."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    @classmethod
    def create(cls, path: str | Path) -> Self:
        """A new file for writing; it replaces one of that name, which readers attached to it still see."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        partial.write_bytes(_MAGIC + bytes(8 * len(FIELDS)))
        os.replace(partial, path)
        with path.open("r+b") as file:
            return cls(_mapped(file.fileno(), mmap.ACCESS_WRITE))

    @classmethod
    def attach(cls, path: str | Path) -> Self:
        """The file of another process, for reading; OSError without one, ValueError if it is something else."""
        with Path(path).open("rb") as file:
            head, size = file.read(len(_MAGIC)), os.fstat(file.fileno()).st_size
            if head != _MAGIC or size != len(_MAGIC) + 8 * len(FIELDS):
                raise ValueError(
                    f"{path} is no file of step statistics of this version; name the file that the worker made"
                )
            return cls(_mapped(file.fileno(), mmap.ACCESS_READ))

    def add(self, **deltas: float) -> None:
        """Add to the named values; ValueError for a name that is none of FIELDS."""
        for name, delta in deltas.items():
            self._values[_place(name)] += delta

    def set(self, **values: float) -> None:
        """Replace the named values; ValueError for a name that is none of FIELDS."""
        for name, value in values.items():
            self._values[_place(name)] = value

    def read(self) -> dict[str, float]:
        """All values by name, in the order of FIELDS."""
        return dict(zip(_PLACE, self._values.tolist(), strict=True))


def _mapped(file: int, access: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(file, 0, access=access), np.float64, offset=len(_MAGIC))


def _place(name: str) -> int:
    place = _PLACE.get(name)
    if place is None:
        raise ValueError(f"no statistic {name!r}; there are {', '.join(_PLACE)}")
    return place


# --- /metrics -----------------------------------------------------------------------------------------


class StepStatsCollector:
    """Reads the files of all workers anew at each scrape; a file that is missing or foreign gives no samples.

    The label `engine` counts the files in the order in which they were named, as vLLM counts engines.
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def describe(self) -> Iterable[Metric]:
        """The metrics without samples: what a registry asks at registration."""
        return _families({})

    def collect(self) -> Iterable[Metric]:
        values: dict[str, dict[str, float]] = {}
        for engine, path in enumerate(tuple(self.paths)):
            with contextlib.suppress(OSError, ValueError):
                values[str(engine)] = StepStats.attach(path).read()
        return _families(values) if values else []


def _families(values: dict[str, dict[str, float]]) -> Iterator[Metric]:
    """values: of each engine. A ratio without a denominator has no sample."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    kinds = {StatKind.COUNTER: CounterMetricFamily, StatKind.GAUGE: GaugeMetricFamily}
    for stat in FIELDS:
        family = kinds[stat.kind](f"fbs:{stat.name}", stat.help, labels=["engine"])
        for engine, read in values.items():
            family.add_metric([engine], read[stat.name])
        yield family
    for name, above, below, text in _RATIOS:
        family = GaugeMetricFamily(f"fbs:{name}", text, labels=["engine"])
        for engine, read in values.items():
            if read[below]:
                family.add_metric([engine], read[above] / read[below])
        yield family


_collector = StepStatsCollector()
_lock = threading.RLock()  # a file goes whenever its configuration is collected


def register_collector(path: str | Path) -> None:
    """Show the file at `path` at this process's /metrics; once per path, whether or not it exists yet."""
    from prometheus_client import REGISTRY

    path = Path(path).absolute()
    with _lock:
        if not _collector.paths:
            REGISTRY.register(_collector)
        if path not in _collector.paths:
            _collector.paths.append(path)
    if _SEVERAL in os.environ:
        _show_beside_several_servers()


@functools.cache  # once in a process
def _show_beside_several_servers() -> None:
    """With several API servers vLLM makes the registry of /metrics anew, from files that hold no collector of ours.

    Limit: a program that has imported vLLM's HTTP metrics before it makes the engine's configuration has the
    old function, and shows no step statistics.
    """
    from prometheus_client import REGISTRY
    from vllm.v1.metrics import prometheus

    plain = prometheus.get_prometheus_registry

    @functools.wraps(plain)
    def get_prometheus_registry() -> CollectorRegistry:
        registry = plain()
        if registry is not REGISTRY:
            registry.register(_collector)
        return registry

    prometheus.get_prometheus_registry = get_prometheus_registry


# --- the file of an engine ----------------------------------------------------------------------------

_SEVERAL = "PROMETHEUS_MULTIPROC_DIR"
_SHARED = "FBS_STATS_FILE"
_PREFIX = "fbs_stats_"
_IDLE_S = 3600


def engine_file(vllm_config: Any) -> Path:
    """A new file for the counters of the engine of this configuration; it goes when the configuration does.

    Several API servers make a configuration each, for one engine: they get the file of the process that
    started them.
    """
    rank = vllm_config.parallel_config._api_process_rank  # -1: of a process that starts API servers
    if vllm_config.parallel_config._api_process_count > 1 and rank >= 0 and _SHARED in os.environ:
        return Path(os.environ[_SHARED])
    _sweep(Path(tempfile.gettempdir()))
    handle, name = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}_")
    os.close(handle)
    if rank < 0:
        os.environ[_SHARED] = name
    weakref.finalize(vllm_config, _remove, Path(name), os.getpid())
    return Path(name)


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed: no such process, and nothing written for an hour.

    The hour is for processes that share the folder, but not the numbering of processes.
    """
    for path in folder.glob(f"{_PREFIX}[0-9]*_*"):
        owner = path.name.removeprefix(_PREFIX).partition("_")[0]
        with contextlib.suppress(OSError):
            idle_s = time.time() - path.stat().st_mtime
            if idle_s > _IDLE_S and not Path(f"/proc/{owner}").exists():
                path.unlink()


def _remove(path: Path, owner: int) -> None:
    from prometheus_client import REGISTRY

    if os.getpid() != owner:  # a forked child ends
        return
    path.unlink(missing_ok=True)
    with _lock:
        if path in _collector.paths:
            _collector.paths.remove(path)
            if not _collector.paths:
                REGISTRY.unregister(_collector)


# --- validators ---------------------------------------------------------------------------------------


class FallbackCounters:
    """What validators and their fallbacks did, as counters of the process that answers requests.

    One object a registry: a second one of the same names is refused with ValueError; see fallback_counters.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter

        self._failures = Counter(
            "fbs:validator_failures", "Texts that failed their check.", registry=registry
        )
        self._reruns = Counter(
            "fbs:reruns", "Texts made again after a failed check.", registry=registry
        )
        self._fallbacks = Counter(
            "fbs:fallbacks", "Requests answered with another text than their first.", registry=registry
        )  # fmt: skip
        self._unresolved = Counter(
            "fbs:unresolved", "Requests answered with a text that failed its check.", registry=registry
        )  # fmt: skip

    def add(self, counts: SafetyCounts) -> None:
        """Count one request, or several added up."""
        self._failures.inc(counts.validator_failures)
        self._reruns.inc(counts.reruns)
        self._fallbacks.inc(counts.fallbacks)
        self._unresolved.inc(counts.unresolved)


@functools.cache
def fallback_counters() -> FallbackCounters:
    """This process's own, on the registry that /metrics shows."""
    from prometheus_client import REGISTRY

    return FallbackCounters(REGISTRY)
