"""Counts of the worker at the API process's /metrics: one mapped file, read by the real Prometheus client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fbs_rl.decode.safety import SafetyCounts
from fbs_rl.serving import step_stats
from fbs_rl.serving.step_stats import (
    FIELDS,
    FallbackCounters,
    StepStats,
    StepStatsCollector,
    fallback_counters,
    register_collector,
)


@pytest.fixture
def collector() -> Iterator[StepStatsCollector]:
    """The process's collector, put back to not registered afterwards."""
    collector = step_stats._collector
    assert not collector.paths
    yield collector
    if collector.paths:
        REGISTRY.unregister(collector)
        collector.paths.clear()


def scraped(registry: CollectorRegistry = REGISTRY) -> dict[str, float]:
    """Samples of ours by name, as a Prometheus server reads them; of a worker's file, with [engine]."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        s.name + (f"[{s.labels['engine']}]" if "engine" in s.labels else ""): s.value
        for s in samples
        if s.name.startswith("fbs:") and not s.name.endswith("_created")
    }


def of_files() -> dict[str, float]:
    """What a scrape shows of the workers' files."""
    return {name: value for name, value in scraped().items() if name.endswith("]")}


# --- the file -----------------------------------------------------------------------------------------


def test_values_are_added_and_set(tmp_path: Path) -> None:
    stats = StepStats.create(tmp_path / "made" / "stats")
    assert stats.read() == {stat.name: 0.0 for stat in FIELDS}
    stats.add(decode_tokens=3, executed_flops=2.0**60)
    stats.add(decode_tokens=4)
    stats.set(gate_version=9)
    stats.set(gate_version=7)
    changed = {n: v for n, v in stats.read().items() if v}
    assert changed == {"decode_tokens": 7.0, "executed_flops": 2.0**60, "gate_version": 7.0}
    assert StepStats.attach(tmp_path / "made" / "stats").read() == stats.read()


def test_a_reader_follows_a_writer_in_another_process(tmp_path: Path) -> None:
    stats = StepStats.create(tmp_path / "stats")
    code = (
        "import sys; from fbs_rl.serving.step_stats import StepStats\n"
        "stats = StepStats.attach(sys.argv[1])\n"
        "for line in sys.stdin: print(stats.read()['decode_tokens'], flush=True)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "stats")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdin is not None and reader.stdout is not None
    with reader:
        for total in (1, 3, 6):
            stats.add(decode_tokens=total - stats.read()["decode_tokens"])
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert float(reader.stdout.readline()) == total


def test_readers_cannot_write(tmp_path: Path) -> None:
    StepStats.create(tmp_path / "stats")
    with pytest.raises(ValueError, match="read-only"):
        StepStats.attach(tmp_path / "stats").add(decode_tokens=1)


def test_unknown_names_and_foreign_files_are_refused(tmp_path: Path) -> None:
    stats = StepStats.create(tmp_path / "stats")
    with pytest.raises(ValueError, match="no statistic 'tokens'; there are decode_tokens, "):
        stats.add(tokens=1)
    with pytest.raises(ValueError, match="no statistic 'version'"):
        stats.set(version=1)
    whole = (tmp_path / "stats").read_bytes()
    for other in (b"", b"FBSSTEP1", whole[:-8], whole + bytes(8), b"x" + whole[1:]):
        (tmp_path / "other").write_bytes(other)
        with pytest.raises(ValueError, match="no file of step statistics"):
            StepStats.attach(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        StepStats.attach(tmp_path / "missing")


def test_a_new_worker_begins_at_zero_and_the_old_file_stays_readable(tmp_path: Path) -> None:
    first = StepStats.create(tmp_path / "stats")
    first.add(decode_tokens=5)
    reader = StepStats.attach(tmp_path / "stats")
    StepStats.create(tmp_path / "stats").add(decode_tokens=1)
    assert reader.read()["decode_tokens"] == 5.0
    assert StepStats.attach(tmp_path / "stats").read()["decode_tokens"] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]


# --- /metrics -----------------------------------------------------------------------------------------


def test_a_scrape_shows_the_file(tmp_path: Path, collector: StepStatsCollector) -> None:
    register_collector(tmp_path / "stats")
    assert of_files() == {}  # no file yet
    stats = StepStats.create(tmp_path / "stats")
    first = of_files()
    assert set(first.values()) == {0.0} and "fbs:skip_ratio[0]" not in first
    stats.add(decode_tokens=10, decode_layer_tokens=80, skipped_layer_tokens=20)
    stats.add(executed_flops=3e9, dense_flops=4e9, layers_entered=7, layers_skipped_whole=1)
    stats.set(gate_version=12)
    shown = of_files()
    assert shown["fbs:decode_tokens_total[0]"] == 10 and shown["fbs:gate_version[0]"] == 12
    assert shown["fbs:skip_ratio[0]"] == 0.25 and shown["fbs:executed_flops_ratio[0]"] == 0.75
    counters = {f"fbs:{s.name}_total[0]" for s in FIELDS if s.name != "gate_version"}
    assert set(shown) == counters | {
        f"fbs:{n}[0]" for n in ("gate_version", "skip_ratio", "executed_flops_ratio")
    }
    (tmp_path / "stats").write_bytes(b"half")
    assert of_files() == {}


def test_every_metric_says_what_it_is(tmp_path: Path, collector: StepStatsCollector) -> None:
    register_collector(tmp_path / "stats")
    StepStats.create(tmp_path / "stats")
    lines = generate_latest(REGISTRY).decode().splitlines()
    for stat in FIELDS:
        name = f"fbs:{stat.name}" + "_total" * (stat.kind == "counter")
        assert f"# HELP {name} {stat.help}" in lines and f"# TYPE {name} {stat.kind}" in lines


def test_a_path_registers_once_and_several_are_engines(
    tmp_path: Path, collector: StepStatsCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, tokens in (("one", 4), ("two", 5)):
        StepStats.create(tmp_path / name).add(decode_tokens=tokens)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "one", str(tmp_path / "one"), "one", "two"):
        register_collector(path)
    shown = of_files()
    assert {n: v for n, v in shown.items() if "decode_tokens" in n} == {
        "fbs:decode_tokens_total[0]": 4.0,
        "fbs:decode_tokens_total[1]": 5.0,
    }
    assert len(shown) == 2 * len(FIELDS)
    (tmp_path / "one").unlink()
    assert of_files()["fbs:decode_tokens_total[1]"] == 5.0


def test_fallbacks_are_counted() -> None:
    registry = CollectorRegistry()
    counters = FallbackCounters(registry)
    counters.add(SafetyCounts.of([None], ["bad", "bad", None]) + SafetyCounts.of([None], ["bad"]))
    counters.add(SafetyCounts.of([None]))
    assert scraped(registry) == {
        "fbs:validator_failures_total": 3.0,
        "fbs:reruns_total": 2.0,
        "fbs:fallbacks_total": 1.0,
        "fbs:unresolved_total": 1.0,
    }
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        FallbackCounters(registry)


def test_a_process_has_one_set_of_fallback_counters() -> None:
    before = scraped().get("fbs:reruns_total", 0.0)
    fallback_counters().add(SafetyCounts(reruns=2))
    assert fallback_counters() is fallback_counters()
    assert scraped()["fbs:reruns_total"] == before + 2


def test_values_lie_on_whole_words(tmp_path: Path) -> None:
    """An aligned eight-byte store is what makes a value whole for a reader."""
    stats = StepStats.create(tmp_path / "stats")
    assert stats._values.dtype == np.float64 and stats._values.flags.aligned
