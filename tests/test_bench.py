"""python -m fbs_rl.bench on a tiny model: what ran and how much was skipped, never how long it took."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fbs_rl.bench import hold_probability, main
from fbs_rl.model.skip_gate import gate_uniform
from tests.tiny import LAYERS, backbone, fresh

ALONE = ["dense", "gates on, nothing skipped", "skipping", "plain transformers"]
TOGETHER = [*ALONE[:3], "skipping, rows agree", ALONE[3]]
IDS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench")
    backbone("qwen3").save_pretrained(path)
    return str(path)


def words(folder: str, *more: str) -> list[str]:
    few = ["--steps", "3", "--warmup", "1", "--prompt-tokens", "12"]
    return ["decode", "--model", folder, *few, *more]


def drawn_share(share: float, seeds: list[int], forced: set[int]) -> float:
    """Share of skipped (row, layer) pairs that the gates' noise gives in the three steps that count. forced: layers
    that always run."""
    position = torch.arange(12 + 1, 12 + 4).expand(len(seeds), -1)
    free = [layer for layer in range(LAYERS) if layer not in forced]
    draws = [gate_uniform(torch.tensor(seeds), position, layer) for layer in free]
    skipped = (torch.stack(draws) < share * LAYERS / len(free)).sum().item()
    return skipped / (position.numel() * LAYERS)


def test_json_names_every_variant_and_its_skip_ratio(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folder, "--batches", "1,2", "--skip", "0.5", "--json")) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert out.count("\n") == 1 and err.count("measuring preset") == 4
    assert result["settings"]["skip"] == 0.5 and result["settings"]["model"] == folder
    assert torch.__version__ in result["host"]
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault((row["preset"], row["batch"]), []).append(row)
    assert list(rows) == [("default", 1), ("default", 2), ("paper", 1), ("paper", 2)]
    for (preset, batch), group in rows.items():
        forced = {"default": {0, 2}, "paper": {2}}[preset]
        assert [row["variant"] for row in group] == (ALONE if batch == 1 else TOGETHER)
        assert group[0]["speedup"] == 1.0
        for row in group:
            assert 0 < row["ms_p50"] <= row["ms_p95"]
            wanted = {
                "skipping": drawn_share(0.5, list(range(batch)), forced),
                "skipping, rows agree": drawn_share(0.5, [0] * batch, forced),
            }.get(row["variant"], 0.0)
            assert row["skip_ratio"] == pytest.approx(wanted)
            assert wanted == 0 or abs(wanted - 0.5) < 0.25


def test_the_table_has_a_line_for_every_row(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(folder, "--batches", "2", "--presets", "paper", "--dtype", "bfloat16")
    assert main([*arguments, "--steps", "2", "--prompt-tokens", "12,7"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert "bfloat16, 2 steps each" in lines[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[3] for row in cells] == 2 * TOGETHER
    for rows, context in ((cells[:5], "12"), (cells[5:], "7")):
        assert all(row[:3] == ["paper", "2", context] and len(row) == 9 for row in rows)
        assert rows[0][4] == "0.0%" and rows[2][4] != "0.0%"


@pytest.mark.parametrize("share", [0.1, 0.36, 0.8])
def test_held_gates_all_give_the_asked_share(share: float) -> None:
    model = fresh()
    hold_probability(model, share)
    free = [i for i in range(LAYERS) if i not in model.config.protected_layers]
    with torch.no_grad():
        prob = model(IDS, gates="dense").gate_prob
    wanted = torch.zeros(LAYERS, *IDS.shape)
    wanted[free] = share * LAYERS / len(free)
    torch.testing.assert_close(prob, wanted)


def test_holding_gates_changes_nothing_else() -> None:
    model = fresh("qwen3")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hold_probability(model, 0.5)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert len(changed) == 2 * 7 and all(".skip_gate.out." in name for name in changed)


@pytest.mark.parametrize("share", ["1.0", "-0.1", "nan", "1.5"])
def test_impossible_shares_end_with_code_2(
    folder: str, capsys: pytest.CaptureFixture[str], share: str
) -> None:
    assert main(words(folder, f"--skip={share}")) == 2
    out, err = capsys.readouterr()
    assert (
        out == "" and err == f"bench: --skip is {float(share)}; give a share of layers in [0, 1)\n"
    )


@pytest.mark.parametrize("option", ["--batches=0", "--prompt-tokens=12,-1", "--prompt-tokens=many"])
def test_impossible_sizes_end_with_code_2(
    folder: str, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(words(folder, option)) == 2
    name, _, given = option.partition("=")
    said = f"bench: {name} is {given}; give whole numbers above 0, as in"
    assert capsys.readouterr().err.startswith(said)


def test_words_that_are_no_options_end_with_code_2(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words(folder, "--skip", "much"))
    assert caught.value.code == 2 and "invalid float value: 'much'" in capsys.readouterr().err
