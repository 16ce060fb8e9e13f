"""python -m fbs_rl.bench calls on a tiny model: every call of a step is accounted for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fbs_rl.bench import main
from fbs_rl.bench_calls import _lasted, describe, parse, run
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.model_geometry import GEOMETRIES
from tests.decode_launchers import PLACES, make_launcher

WORDS = ["--geometry", "tiny", "--dtype", "float32", "--skip", "0.5", "--prompt-tokens", "5", "--steps", "2",
         "--set", "paw_layers=every:4", "paw_rank=32", "paw_vocab_size=50", "paw_shortlist=8",
         "chunk_cache=6"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_every_call_of_a_step_is_accounted_for(place: str) -> None:
    shape = GEOMETRIES["tiny"]
    heads, groups = int(shape["num_attention_heads"]), int(shape["num_key_value_heads"])
    launcher = make_launcher(place, KernelShape(1, False, int(shape["head_dim"]), heads // groups))
    made = run(parse(WORDS), launcher)
    assert made["skipped"]["plain"] == made["skipped"]["gates on, nothing skipped"] == 0
    assert made["skipped"]["50% forced"] == pytest.approx(0.5, abs=0.13)  # of layers that are few
    layers, hidden = int(shape["num_hidden_layers"]), int(shape["hidden_size"])
    rows = {(row["variant"], row["call"]): row for row in made["rows"]}
    for variant in ("plain", "gates on, nothing skipped", "50% forced"):
        of = {call: row for (name, call), row in rows.items() if name == variant}
        run_layers = layers * (1 - made["skipped"][variant])
        assert of["attention"]["count"] >= of["product_down"]["count"] == pytest.approx(run_layers)
        megabytes = run_layers * hidden * int(shape["intermediate_size"]) * 4 / 1e6
        assert of["product_down"]["weights_mb"] == pytest.approx(megabytes)
        total = sum(row["sum_us"] for row in of.values())
        assert total == pytest.approx(1e3 * made["step_ms"][variant], rel=0.2)
        assert all(row["min_us"] <= row["median_us"] <= row["max_us"] for row in of.values())
    assert ("plain", "decide") not in rows and rows["50% forced", "decide"]["count"] > 1
    assert ("gates on, nothing skipped", "leave_entry") not in rows  # it was void
    assert "| 50% forced | leave_entry |" in describe(made)


def test_what_was_void_counts_for_nothing() -> None:
    ended_TC = np.array([[100, 130, 0, 0, 150], [1000, 1030, 1040, 0, 1090]], np.int64)
    lasted_TC = _lasted(ended_TC)
    wanted = np.array([[30, np.nan, np.nan, 20], [30, 10, np.nan, 50]])
    np.testing.assert_array_equal(lasted_TC, wanted)


def test_without_cuda_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calls", *WORDS]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="--steps"):
        run(parse([*WORDS, "--steps", "0"]))
