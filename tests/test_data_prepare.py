"""Whole preparations: the same bytes whatever did the work, and whatever happened on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbs_rl.data.prepare import Prepared, prepare
from fbs_rl.data.prepare_config import PrepareConfig, flat, read_config
from fbs_rl.data.prepare_plan import make_plan
from fbs_rl.data.shards import PackedShards
from fbs_rl.data.work_folder import Identity, WorkFolder
from fbs_rl.data.worker_pool import LocalPool
from tests.data_corpus import result_digests, texts, tokenizer_folder, write_jsonl
from tests.dying_task import upper_or_die

DEADLINE_S = 600.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """English and Chinese rows with copies and a malformed one, in two files."""
    folder = tmp_path_factory.mktemp("inputs")
    english, chinese = texts("en", 30), texts("zh", 6)
    rows: list[Any] = [{"text": t, "source": "novels"} for t in english]
    first = write_jsonl(folder / "a.jsonl", [*rows, "{broken", rows[3]])
    second = write_jsonl(
        folder / "b.jsonl", [{"text": t} for t in [*chinese, chinese[0], english[5]]]
    )
    return [first, second]


def settings(tokenizer: str, *more: str) -> PrepareConfig:
    overrides = (
        f"tokenizer={tokenizer}",
        "sequence_tokens=64",
        "heldout_frac=0.2",
        "shard_tokens=4000",
    )
    return read_config(None, [*overrides, *more])


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: str, inputs: list[str]
) -> Prepared:
    """One process, one unit, never interrupted."""
    return prepare(settings(tokenizer), inputs, tmp_path_factory.mktemp("reference") / "out")


def test_every_kept_document_is_in_the_shards_once(
    reference: Prepared, inputs: list[str], tokenizer: str
) -> None:
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(tokenizer)
    found: dict[str, list[str]] = {}
    for split in ("train", "heldout"):
        data = PackedShards.open(reference.out, split)
        data.verify()
        rows = data.rows(np.arange(len(data)))
        ids = rows.ids_BT[rows.document_BT >= 0]
        found[split] = read.decode(ids.tolist()).split("<eos>")[:-1]
    wanted = [text.strip() for text in texts("en", 30) + texts("zh", 6)]
    assert sorted(found["train"] + found["heldout"]) == sorted(wanted)
    assert found["train"] != [t for t in wanted if t in found["train"]]  # they were shuffled
    assert 1 <= len(found["heldout"]) <= 18
    record: Any = reference.manifest.record
    assert record["removed"]["exact duplicate"]["documents"] == 3
    assert record["malformed"]["rows"] == 1
    assert record["malformed"]["first"][0].startswith(f"{inputs[0]}:31: ")
    assert record["kept_by_source"]["novels"]["documents"] == 30
    assert record["chunk_labels"]["documents_with_chinese"] == 6
    assert record["chunk_labels"]["chunks"] > 500 and record["chunk_labels"]["mean_coverage"] > 0.5
    assert len(record["examples"]) == 3 and len(record["examples"][0]["labels"]) == 64
    assert len(reference.manifest.splits["train"]) > 3


@pytest.mark.parametrize(("workers", "unit_bytes"), [(1, 3_000), (2, 40_000)])
def test_bytes_depend_neither_on_workers_nor_on_units(
    reference: Prepared,
    tokenizer: str,
    inputs: list[str],
    tmp_path: Path,
    workers: int,
    unit_bytes: int,
) -> None:
    made = prepare(
        settings(tokenizer), inputs, tmp_path / "out", workers=workers, unit_bytes=unit_bytes
    )
    assert result_digests(made.out) == result_digests(reference.out)
    assert not (made.out / ".work").exists() and not (made.out / ".lock").exists()


def test_three_workers_make_the_same_bytes(
    tokenizer: str, inputs: list[str], tmp_path: Path
) -> None:
    """English alone: each worker that meets Chinese loads a segmenter of its own, for seconds."""
    alone = prepare(settings(tokenizer), inputs[:1], tmp_path / "a")
    three = prepare(settings(tokenizer), inputs[:1], tmp_path / "b", workers=3, unit_bytes=20_000)
    assert result_digests(three.out) == result_digests(alone.out)


def test_a_seed_changes_order_and_held_out_documents(
    reference: Prepared, tokenizer: str, inputs: list[str], tmp_path: Path
) -> None:
    english = prepare(settings(tokenizer), inputs[:1], tmp_path / "a")
    other = prepare(settings(tokenizer, "seed=1"), inputs[:1], tmp_path / "b")
    assert english.manifest.digest != other.manifest.digest
    assert english.manifest.record["kept"] == other.manifest.record["kept"]


def start_cli(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "fbs_rl.data", "prepare", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.01)


def test_a_killed_run_goes_on_where_it_was(
    reference: Prepared, tokenizer: str, inputs: list[str], tmp_path: Path
) -> None:
    """SIGKILL while documents are encoded; then the same command, with another number of workers."""
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(nested(flat(settings(tokenizer)))))
    process = start_cli([*inputs, "--out", str(out), "--config", str(config)])
    try:
        wait_until(lambda: (out / ".work" / "selection" / "selection.json").exists(), process)
        with pytest.raises(
            BlockingIOError, match=f"another process .pid {process.pid}. is preparing"
        ):
            prepare(settings(tokenizer), inputs, out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
    assert not (out / "manifest.json").exists()
    cleaned = out / ".work" / "clean" / "00000.json"
    before = cleaned.stat().st_mtime_ns
    made = prepare(settings(tokenizer), inputs, out, keep_work=True)
    assert cleaned.stat().st_mtime_ns == before  # it was not done again
    assert made.new and result_digests(out) == result_digests(reference.out)


def nested(leaves: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *path, last = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def test_work_that_stopped_at_any_point_goes_on(
    reference: Prepared, tokenizer: str, inputs: list[str], tmp_path: Path
) -> None:
    """As if it had been interrupted after each stage, and with half of a stage's tasks done."""
    out = tmp_path / "out"
    prepare(settings(tokenizer), inputs, out, unit_bytes=40_000, keep_work=True)
    for doomed in ("shards/*.json", "groups/*0.*", "selection/*", "clean/*1.json", "clean/*"):
        (out / "manifest.json").unlink()
        lost = list((out / ".work").glob(doomed))
        assert lost
        for path in lost:
            path.unlink()
        if doomed.startswith("clean"):  # what came of it goes as well
            for path in (out / ".work").glob("[gs]*/*"):
                path.unlink()
        made = prepare(settings(tokenizer), inputs, out, unit_bytes=40_000, keep_work=True)
        assert made.new and result_digests(out) == result_digests(reference.out)


def test_another_division_of_labour_starts_anew(
    reference: Prepared, tokenizer: str, inputs: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(settings(tokenizer), inputs, out, unit_bytes=40_000, keep_work=True)
    (out / "manifest.json").unlink()
    prepare(settings(tokenizer), inputs, out)
    assert result_digests(out) == result_digests(reference.out)


def test_a_finished_folder_is_left_as_it_is(
    reference: Prepared, tokenizer: str, inputs: list[str], tmp_path: Path
) -> None:
    before = result_digests(reference.out)
    assert not prepare(settings(tokenizer), inputs, reference.out, workers=2).new
    with pytest.raises(
        FileExistsError, match=r"holds data prepared with other filters\.min_chars, seed"
    ):
        prepare(settings(tokenizer, "seed=3", "filters.min_chars=9"), inputs, reference.out)
    with pytest.raises(FileExistsError, match="holds data prepared with other input files"):
        prepare(settings(tokenizer), inputs[:1], reference.out)
    assert result_digests(reference.out) == before


def test_input_that_was_moved_is_the_same_input(
    reference: Prepared, tokenizer: str, inputs: list[str], tmp_path: Path
) -> None:
    moved = [
        str(Path(path).rename(Path(path).with_name(f"moved-{Path(path).name}"))) for path in inputs
    ]
    try:
        assert not prepare(settings(tokenizer), moved, reference.out).new
    finally:
        for new, old in zip(moved, inputs, strict=True):
            Path(new).rename(old)


def test_too_many_malformed_rows_are_an_error(tokenizer: str, tmp_path: Path) -> None:
    rows: list[Any] = [{"text": text} for text in texts("en", 6)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, "bad", "bad", rows[0], "bad"])
    config = settings(tokenizer, "rows.malformed_limit=2")
    for unit_bytes in (2**20, 4_000):
        with pytest.raises(
            ValueError, match=rf"more than 2 rows cannot be read, {path}:10 among them"
        ):
            prepare(config, [path], tmp_path / f"out{unit_bytes}", unit_bytes=unit_bytes)
    made = prepare(settings(tokenizer, "rows.malformed_limit=3"), [path], tmp_path / "out")
    assert made.manifest.record["malformed"]["rows"] == 3


def test_nothing_left_is_an_error(tokenizer: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}] * 3)
    with pytest.raises(ValueError, match="none of the 3 rows is left: 3 too short"):
        prepare(settings(tokenizer), [path], tmp_path / "out")


def test_workers_that_die_or_fail() -> None:
    pool = LocalPool(2)
    try:
        tasks = ["a", "b", "c", "d", "e"]
        done = sorted((d.number, d.returned) for d in pool.run(upper_or_die, tasks))
        assert done == [(n, task.upper()) for n, task in enumerate(tasks)]
        with pytest.raises(FileNotFoundError, match="there is no such thing") as caught:
            list(pool.run(upper_or_die, ["a", "fail"]))
        assert "in a worker process" in caught.value.__notes__[0]
    finally:
        pool.close()
    pool = LocalPool(1)
    try:
        with pytest.raises(
            ChildProcessError, match=r"died at task 1 \(SIGKILL.*run the same command"
        ):
            list(pool.run(upper_or_die, ["a", "die", "b"]))
    finally:
        pool.close()


def test_a_lock_that_its_holder_left_behind_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("1")
    held, second = (WorkFolder(tmp_path / "out", Identity({}, ())) for _ in range(2))
    with held, pytest.raises(BlockingIOError):  # taken over for real: another holder is refused
        second.__enter__()


def test_a_plan_names_units_and_settings(tokenizer: str, inputs: list[str]) -> None:
    plan = make_plan(settings(tokenizer), inputs, "nowhere", unit_bytes=50_000)
    assert len(plan.units) > 2 and sum(u.input_bytes for u in plan.units) == sum(
        f.bytes for f in plan.files
    )
    assert plan.identity.settings["tokenizer"] == plan.encoder.digest
