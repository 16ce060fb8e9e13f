"""python -m fbs_rl.bench vllm on a tiny model: what ran, what was skipped, what it cost, never how long it took."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fbs_rl.bench import main
from fbs_rl.bench_engine import held_logits
from tests.tiny import LAYERS, fresh

FEW = ["vllm", "--geometry", "tiny", "--eager", "only", "--rounds", "1", "--prompt-tokens", "8"]
FEW += ["--tokens", "6"]


def test_json_has_what_each_variant_skipped_and_cost(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--presets", "paper", "--batches", "1,2", "--skips", "0,0.5", "--json"]) == 0
    out = capfd.readouterr().out
    result = json.loads(out)  # nothing that vLLM prints is among it
    assert result["settings"]["geometry"] == "tiny"
    rows: dict[int, dict[str, Any]] = {}
    for row in result["rows"]:
        rows.setdefault(row["batch"], {})[row["variant"]] = row
        assert row["preset"] == "paper" and row["cpu_ms"] > 0 and row["wall_ms"] > 0
    assert list(rows[1]) == ["vLLM, eager", "fbs, 0%", "fbs, 50%"]
    assert list(rows[2]) == [*list(rows[1])[:2], "fbs, 50%, independent", "fbs, 50%, consensus"]
    for found in rows.values():
        stock, none = found["vLLM, eager"], found["fbs, 0%"]
        assert stock["cpu_ratio"] == stock["byte_bound"] == stock["flops_ratio"] == 1.0
        assert none["skip_ratio"] == 0.0 and none["flops_ratio"] > 1.0
    apart, together = rows[2]["fbs, 50%, independent"], rows[2]["fbs, 50%, consensus"]
    assert 0.2 < apart["skip_ratio"] < 0.8
    assert together["skip_ratio"] == 0.5  # 4 of 8 layers at every token
    assert together["flops_ratio"] < none["flops_ratio"]
    # A layer that one row runs is read for all, so agreeing saves more bytes than skipping alone.
    assert together["byte_bound"] > apart["byte_bound"] > none["byte_bound"]


@pytest.mark.parametrize("share", [0.125, 0.36, 0.5])
def test_a_set_of_layers_is_skipped_for_certain(share: float) -> None:
    config = fresh().config
    logit_L = held_logits(config, share, apart=False)
    certain = [i for i, logit in enumerate(logit_L) if logit > 6]
    assert len(certain) == round(share * LAYERS)
    assert not config.protected_layers.intersection(certain)
    assert all(abs(logit) > 6 for logit in logit_L)


def test_whole_blocks_are_skipped_where_one_gate_decides_for_several_layers() -> None:
    config = fresh(gate_block=2).config
    logit_L = held_logits(config, 0.5, apart=False)
    assert logit_L[::2] == logit_L[1::2]
    assert sum(logit > 6 for logit in logit_L) == LAYERS // 2


def test_a_share_of_zero_leaves_gates_undecided() -> None:
    assert held_logits(fresh().config, 0.0, apart=True) == [0.0] * LAYERS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--skips", "1.0"], "--skips is 1.0; give shares of layers in [0, 0.9], as in 0,0.36"),
        (["--skips", "some"], "--skips is some; give shares of layers in [0, 0.9], as in 0,0.36"),
        (["--batches", "0"], "--batches is 0; give batch sizes, as in 1,8,32"),
        (["--tokens", "2"], "--tokens must be at least 3, --rounds and --prompt-tokens at least 1"),
    ],
)
def test_settings_that_cannot_be_measured_end_with_code_2(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FEW, *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"bench: {said}\n"
