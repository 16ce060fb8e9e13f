"""python -m fbs_rl.bench latency | batch | overhead | table on a tiny model: what ran and what was counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fbs_rl.bench import main
from fbs_rl.bench_latency import describe, parse, run
from fbs_rl.decode.step_program import kernel_shape
from fbs_rl.latency_engines import StepTrace, Variant, Workload, hold_gates, make_engine
from fbs_rl.latency_figures import bootstrap_interval, entropy_slices
from fbs_rl.latency_protocol import Sample, measure, run_request, step_entropies
from fbs_rl.model_geometry import random_backbone
from fbs_rl.types import GateMode
from tests.decode_launchers import PLACES, make_launcher
from tests.tiny import VOCAB, backbone, fresh, lively

SMALL = [
    "paw_layers=every:4",
    "paw_rank=32",
    "paw_vocab_size=50",
    "paw_shortlist=8",
    "chunk_cache=6",
]


def words(what: str, *more: str) -> list[str]:
    few = ["--prompt-tokens", "10", "--new-tokens", "4", "--warmups", "1", "--runs", "2"]
    model = ["--geometry", "tiny", "--dtype", "float32", "--device", "cpu", "--set", *SMALL]
    return [what, *model, *few, *more]


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_latency_puts_every_way_of_decoding_side_by_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = result(capsys, *words("latency", "--skip", "0.5"))
    assert made["random_weights"] and made["host"]["copy_bytes_per_s"] > 0
    rows = {row["variant"]: row for row in made["rows"]}
    assert list(rows) == [
        "transformers",
        "incremental, plain",
        "incremental, 50% forced",
        "incremental, 50% drawn",
    ]
    assert rows["transformers"]["ratio"] == rows["transformers"]["step_ratio"] == 1.0
    assert rows["incremental, 50% forced"]["skip_ratio"] == 0.5
    assert rows["incremental, plain"]["skip_ratio"] == 0 == rows["transformers"]["skip_ratio"]
    for row in rows.values():
        assert 0 < row["prefill_ms"] < row["request_ms"] <= row["request_p95_ms"]
        assert row["tokens_per_s"] == pytest.approx(4e3 / row["request_ms"])
        assert row["low_ms"] <= row["difference_ms"] + 1e-9 and row["own_mb"] is None
        assert len(row["tokens"]["entropy_T"]) == len(row["tokens"]["step_ms_T"]) == 4
    plain, skipping = rows["incremental, plain"], rows["incremental, 50% forced"]
    assert plain["flops_a_token"] == rows["transformers"]["flops_a_token"]
    assert skipping["flops_frac"] < 1 == plain["flops_frac"]


def test_vllm_takes_its_turns_beside_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    """Stock vLLM and the plugin, each a process; the plugin skips what the model's own pass skips."""
    engines = ["--engines", "incremental,vllm,vllm-fbs", "--vllm", "enforce_eager=true"]
    arguments = words("latency", "--skip", "0.5", *engines, "--serving", "decode_path=masked")
    assert main([*arguments, "--batches", "1,2", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)  # nothing that vLLM prints is among it
    assert set(made["vllm"]) == {"vllm", "vllm-fbs"}
    assert all(facts["vllm"] and facts["cuda_graphs"] == "none" for facts in made["vllm"].values())
    names = ["plain", "50% forced", "50% drawn"]
    wanted = [f"incremental, {n}" for n in names] + ["vllm, dense", "vllm-fbs, dense"]
    wanted += [f"vllm-fbs, {n}" for n in names[1:]]
    for batch in (1, 2):
        rows = {row["variant"]: row for row in made["rows"] if row["batch"] == batch}
        assert list(rows) == wanted
        stock, forced = rows["vllm, dense"], rows["vllm-fbs, 50% forced"]
        assert stock["engine"] == "vllm" and forced["engine"] == "vllm-fbs"
        assert stock["vllm_ratio"] == 1.0 and stock["flops_frac"] == 1.0
        for row in rows.values():
            assert row["vllm_ratio"] == pytest.approx(row["request_ms"] / stock["request_ms"])
        assert forced["skip_ratio"] == rows["incremental, 50% forced"]["skip_ratio"] == 0.5
        assert (
            rows["vllm-fbs, dense"]["skip_ratio"] == 0 < rows["vllm-fbs, 50% drawn"]["skip_ratio"]
        )
        assert stock["bytes_a_step"] == rows["incremental, plain"]["bytes_a_step"]
        assert stock["tokens"]["entropy_T"] is None and len(stock["tokens"]["step_ms_T"]) == 4
        assert 0 < stock["prefill_ms"] < stock["request_ms"]
    lines = describe(made).split("\n")
    assert "vllm-fbs is vLLM" in lines[0] and "request / vLLM" in lines[2]
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_an_engine_that_cannot_start_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words("latency", "--engines", "vllm-fbs", "--serving", "decode_path=fast")) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1] == (
        "bench: the engine vllm-fbs could not start: fbs.decode_path is 'fast'; "
        "it must be one of compact, masked, kernel"
    )


def test_batches_and_overheads(capsys: pytest.CaptureFixture[str]) -> None:
    made = result(capsys, *words("batch", "--batches", "1,3", "--engines", "incremental"))
    assert [row["batch"] for row in made["rows"]] == [1, 1, 3, 3]
    assert made["rows"][3]["skip_ratio"] == made["rows"][1]["skip_ratio"] == 0.375
    made = result(capsys, *words("overhead", "--engines", "incremental"))
    names = ["plain", "modules, no gates", "gates on, nothing skipped", "gates drawn, nothing skipped"]  # fmt: skip
    assert [row["variant"] for row in made["rows"]] == [f"incremental, {name}" for name in names]
    bytes_read = [row["bytes_a_step"] for row in made["rows"]]
    assert bytes_read[0] < bytes_read[1] < bytes_read[2]
    assert made["rows"][2]["skip_ratio"] == 0


def test_saved_results_make_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("latency", "--engines", "transformers", "--out", str(tmp_path))) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "latency.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["table", str(tmp_path / "latency.json")]) == 0
    assert capsys.readouterr().out == shown == (tmp_path / "latency.md").read_text()
    assert "random weights (latency only)" in shown
    lines = shown.strip().split("\n")[2:]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 3


def test_a_saved_model_and_its_own_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone("qwen3").save_pretrained(tmp_path)
    capsys.readouterr()  # what libraries say while they are loaded
    model = ["--model", str(tmp_path), "--dtype", "float32", "--device", "cpu", "--set", *SMALL]
    few = ["--prompt-tokens", "6", "--new-tokens", "2", "--warmups", "0", "--runs", "1"]
    made = result(capsys, "latency", *model, *few, "--tau", "0.0", "--engines", "incremental")
    assert [row["variant"] for row in made["rows"]] == ["incremental, plain", "incremental, tau 0"]
    assert made["rows"][1]["skip_ratio"] == 6 / 8 and not made["random_weights"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engines", "sglang"], "no engine 'sglang'"),
        (["--engines", "graph"], "the graph decoder needs a CUDA device"),
    ],
)
def test_impossible_settings_end_with_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(words("latency", *arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith(f"bench: {sentence}")
    assert main(["table"]) == 2 and "table needs files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "share"), [(GateMode.DENSE, None), (GateMode.THRESHOLD, 0.5), (GateMode.SAMPLE, 0.5)]
)
def test_an_engine_feeds_what_is_forced(mode: GateMode, share: float | None) -> None:
    """Its logits are those of the parallel pass with the same gates."""
    model, load = fresh("qwen3"), Workload(2, 8, 3)
    engine = make_engine(Variant("it", "incremental", True, mode, share), model, None, load, None)
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(2))
    taken = run_request(engine, ids[:, :8], ids[:, 8:])
    assert taken.shape == (4,) and (taken > 0).all()
    gates = {"tau": 0.5} if mode is GateMode.THRESHOLD else {"gate_seed": 0}
    with torch.no_grad():
        wanted = model(ids, gates=mode, decode_start=8, **({} if mode is GateMode.DENSE else gates))
    torch.testing.assert_close(engine.logits(), wanted.logits[:, -1], atol=1e-5, rtol=1e-5)
    found = engine.trace()
    assert found.skip_LBT is not None and torch.equal(found.skip_LBT, wanted.skip[:, :, 8:])
    prob = wanted.logits[:, 8:].double().softmax(-1)
    entropy_T = -(prob * prob.log()).sum(-1).mean(0)
    np.testing.assert_allclose(step_entropies(engine, ids[:, :8], ids[:, 8:]), entropy_T, rtol=1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_graph_engines_of_one_model_skip_what_each_was_told(place: str) -> None:
    """The second is made, and used, before the first runs: what it tells the model's gates must not reach the first."""
    model, load = fresh("qwen3").to("cuda" if place == "cuda" else "cpu"), Workload(1, 8, 3)
    launcher = make_launcher(place, kernel_shape(model, 1))
    variants = [Variant("it", "graph", True, GateMode.THRESHOLD, share) for share in (0.5, 0.0)]
    engines = [make_engine(variant, model, None, load, launcher) for variant in variants]
    ids = torch.randint(0, VOCAB, (1, 11), generator=torch.Generator().manual_seed(2))
    shares = []
    for engine in (*reversed(engines), engines[0]):
        run_request(engine, ids[:, :8], ids[:, 8:])
        skip_LBT = engine.trace().skip_LBT
        assert skip_LBT is not None
        shares.append(float(skip_LBT.float().mean()))
    assert shares == [0.0, 0.5, 0.5]


def test_a_batch_that_is_measured_is_kept_before_the_next_begins() -> None:
    """What takes minutes must not be lost with what comes after it."""
    kept: list[list[int]] = []
    few = words("batch", "--batches", "1,2", "--skip", "0.5")
    result = run(parse(few), lambda made: kept.append([row["batch"] for row in made["rows"]]))
    assert kept == [[1] * (len(kept[1]) // 2), [row["batch"] for row in result["rows"]]]
    assert set(kept[1]) == {1, 2}


def test_held_gates_answer_what_they_are_told() -> None:
    model = fresh("qwen3")
    hold_gates(model, [1.0 - 0.1 * layer for layer in range(8)])
    with torch.no_grad():
        prob = model(torch.arange(5).unsqueeze(0), gates="dense").gate_prob
    for layer in set(range(8)) - model.config.protected_layers:
        wanted = torch.sigmoid(torch.tensor(1.0 - 0.1 * layer))
        torch.testing.assert_close(prob[layer], wanted.expand(1, 5))


def test_the_interval_of_a_difference() -> None:
    """Rounds that are slow for both say nothing about the difference."""
    drift = np.linspace(0, 50, 40)
    noise = np.random.default_rng(1).normal(0, 0.1, (2, 40))
    low, high = bootstrap_interval(10 + drift + noise[0], 8 + drift + noise[1])
    assert 1.5 < low < 2 < high < 2.5
    assert bootstrap_interval(drift, drift) == (0.0, 0.0)


def test_slices_by_entropy() -> None:
    """Steps of 1 ms where the next token is sure, of 4 ms where it is not; a row more doubles the tokens."""
    sample = Sample(
        np.ones(3), np.tile([4.0, 1.0, 4.0, 1.0], (3, 1)), np.array([2.0, 0.1, 3.0, 0.2]), StepTrace(), None, None
    )  # fmt: skip
    assert entropy_slices(sample, 1) == (1000.0, 250.0)
    assert entropy_slices(sample, 2) == (2000.0, 500.0)


def test_geometries() -> None:
    made = random_backbone("tiny", torch.bfloat16, "cpu")
    assert made.dtype == torch.bfloat16 and not made.training
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    with pytest.raises(ValueError, match="no geometry 'huge'"):
        random_backbone("huge", torch.bfloat16, "cpu")
    assert lively("qwen3").config.layer_count == made.config.num_hidden_layers


@pytest.mark.parametrize("engines", ["incremental", "incremental,vllm"])
def test_a_bench_that_is_stopped_shows_the_rounds_so_far(tmp_path: Path, engines: str) -> None:
    """What a signal would cost otherwise are all rounds that were measured. It reaches all processes, as from a
    terminal or from `timeout`."""
    arguments = words("batch", "--engines", engines, "--batches", "1,2", "--out", str(tmp_path))
    arguments += ["--vllm", "enforce_eager=true"]
    arguments[arguments.index("--runs") + 1] = "100000"
    command = [sys.executable, "-m", "fbs_rl.bench", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as bench:
        assert bench.stderr is not None
        said = ""
        while "round 3 of" not in said:
            said += bench.stderr.read(1)
        os.killpg(bench.pid, signal.SIGTERM)
        printed, _ = bench.communicate(timeout=300)
    assert bench.returncode == 0 and "stopped by a signal after" in printed
    rows = json.loads((tmp_path / "batch.json").read_text())["rows"]
    assert {row["batch"] for row in rows} == {1} and all(2 <= row["runs"] < 100000 for row in rows)


def test_a_bench_that_is_stopped_in_its_warm_ups_says_so() -> None:
    model, load = backbone("llama"), Workload(1, 3, 1)
    maker = {
        "plain": lambda: make_engine(
            Variant("plain", "incremental", False), fresh(), model, load, None
        )
    }
    with pytest.raises(InterruptedError, match="after 1 of 2 warm-ups"):
        measure(maker, load, 2, 5, VOCAB, torch.device("cpu"), lambda _: None, lambda: True)
