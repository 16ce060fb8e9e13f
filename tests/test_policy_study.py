"""The study of skip policies: its figures against the reward's own code, its curves, its table, the whole command."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fbs_rl.config import from_tree
from fbs_rl.model import FBSConfig
from fbs_rl.policy_study import main
from fbs_rl.rl.credit import score_episode
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.heldout_points import FIGURES, Heldout, Point, measure_point, own_dense, skip_of
from fbs_rl.rl.parallel_pass import drawn_gates, threshold_gates
from fbs_rl.rl.parallel_rollouts import ParallelRollouts
from fbs_rl.rl.policy_trial import keep, restore
from fbs_rl.rl.reward import RewardSettings, Sampler, SegmentKind
from fbs_rl.rl.rollout import RolloutSettings, RolloutTask
from fbs_rl.rl.skip_curves import Bench, at_skip, paired_difference
from fbs_rl.rl.study_table import study_tables
from tests.served_tiny import make_folder
from tests.small_questions import write_questions
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny import LAYERS, NOOP, VOCAB, enliven, fresh, lively
from tests.tiny_training import make_backbone, make_shards, settings_tree

POLICY = GatePolicy(low=0.1, high=0.9)
REWARD = RewardSettings(beta=0.3, lam=0.2)


def tasks(count: int = 6) -> list[RolloutTask]:
    """Of uneven length; the answer of the first has a single token, so its gold segment has no column."""
    draw = torch.Generator().manual_seed(8)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist())

    return [RolloutTask(f"q{i}", ids(3 + i % 4), ids(1 + i % 5), (70 * i,)) for i in range(count)]


def heldout(rollouts: ParallelRollouts, samples: int = 1, tokens: int = 7) -> Heldout:
    settings = RolloutSettings(Sampler.DENSE, tokens)
    texts = rollouts.texts(tasks(), settings)
    return Heldout.of(rollouts.model, texts, [t.seeds[0] for t in tasks()], samples, 200)


# --- one point ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NOOP])
@pytest.mark.parametrize(
    "tree",
    [
        {"beta": 0.3, "lam": 0.2},
        {"beta": 0.3, "lam": 0.2, "quality": "gold", "nll_floor": -0.01, "nll_ceiling": 0.1},
        {"beta": 0.3, "lam": 0.2, "only_increase": True},
    ],
)
def test_figures_of_questions_are_those_of_their_episodes(
    options: dict[str, Any], tree: dict[str, Any]
) -> None:
    model = enliven(fresh(**options))
    rollouts, reward = ParallelRollouts(model, 200), from_tree(RewardSettings, tree)
    drawn = heldout(rollouts, samples=3)
    found = measure_point(model, drawn, drawn_gates(model.config, POLICY, drawn.seeds), reward, 0.1)
    more = [replace(t, seeds=tuple(t.seeds[0] + i for i in range(3))) for t in tasks()]
    episodes = rollouts.roll(more, RolloutSettings(Sampler.DENSE, 7, policy=POLICY))
    scored = [score_episode(episode, model.config, reward) for episode in episodes]
    for question in range(6):
        mine = scored[3 * question : 3 * question + 3]
        wanted = {
            "reward": [s.reward.total for s in mine],
            "compute_term": [s.reward.compute_term for s in mine],
            "quality_term": [s.reward.quality_term for s in mine],
            "flops": [s.flops for s in mine],
            "dense_flops": [s.dense_flops for s in mine],
        }
        for kind, name in ((SegmentKind.GOLD, "dnll_gold"), (SegmentKind.SELF, "dnll_self")):
            segments = [x for s in mine for x in s.episode.segments if x.kind is kind]
            wanted[name] = [float((x.nll_gated_N - x.nll_dense_N).mean()) for x in segments]
        skips = [np.concatenate([x.trace.skip_TL for x in s.episode.segments]) for s in mine]
        wanted["skipped"], wanted["places"] = [s.sum() for s in skips], [s.size for s in skips]
        assert set(wanted) == set(FIGURES)
        for name, values in wanted.items():
            np.testing.assert_allclose(
                found.of(name)[question], np.mean(values), rtol=1e-5, atol=1e-6, err_msg=name
            )
    assert 0.1 < found.skip < 0.8
    np.testing.assert_allclose(np.mean(found.rate_L), found.skip, rtol=1e-6)


def test_a_question_without_a_column_is_paid_nothing() -> None:
    rollouts = ParallelRollouts(lively(), 200)
    gold = heldout(rollouts, tokens=0)
    found = measure_point(lively(), gold, threshold_gates(0.0), REWARD, 1.0)
    assert found.of("places")[0] == 0 == found.of("reward")[0] and found.of("reward")[1] != 0


def test_a_moved_dense_pass_moves_rewards_and_not_the_increase() -> None:
    model = copy.deepcopy(lively())
    rollouts = ParallelRollouts(model, 200)
    scoring = heldout(rollouts)
    assert torch.equal(own_dense(model, scoring), scoring.start_nll_RN)
    model.lm_head.weight.data *= 1.3
    gates = threshold_gates(2.0)
    moved = measure_point(model, scoring, gates, REWARD, 0.0, None, own_dense(model, scoring))
    np.testing.assert_allclose(moved.of("quality_term"), 0, atol=1e-9)
    assert np.abs(moved.of("dnll_gold")).min() > 1e-3


def test_restoring_the_start_undoes_all() -> None:
    model = copy.deepcopy(lively())
    scoring, kept = heldout(ParallelRollouts(model, 200)), keep(model)
    before = measure_point(model, scoring, threshold_gates(0.5), REWARD, 0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".skip_gate." in name or ".paw." in name:
                parameter.add_(0.3)
    other = measure_point(model, scoring, threshold_gates(0.5), REWARD, 0.1)
    restore(model, kept)
    again = measure_point(model, scoring, threshold_gates(0.5), REWARD, 0.1)
    assert np.array_equal(again.figures_FQ, before.figures_FQ)
    assert not np.array_equal(other.figures_FQ, before.figures_FQ)


# --- curves ---------------------------------------------------------------------------------------------


def make_bench() -> Bench:
    rollouts = ParallelRollouts(lively(), 200)
    half = heldout(rollouts)
    return Bench(lively(), half, half, heldout(rollouts, samples=4), (0.1, 0.3))


def test_curves_reach_the_ratios_that_are_asked_for() -> None:
    bench = make_bench()
    places = LAYERS * int(bench.tuning.questions)
    thresholds = bench.thresholds(REWARD, moved=False)
    drawn = bench.draws(POLICY, REWARD, moved=False)
    random = bench.random(REWARD, 0)
    for curve in (thresholds, drawn, random):
        assert curve[0].skip == 0 and [p.asked for p in curve] == [0.0, 0.1, 0.3, bench.asked[-1]]
        assert [p.skip for p in curve[1:]] == pytest.approx(bench.asked, abs=0.06 + 2 / places)
    # Knobs are set on these very questions, so what is found there is what is measured.
    for point in thresholds[1:]:
        assert point.parameter is not None
        assert skip_of(bench.model, bench.scoring, threshold_gates(point.parameter)) == point.skip
    assert thresholds[0].of("dnll_gold") == pytest.approx(np.zeros(6), abs=1e-6)
    assert thresholds[0].of("reward").max() <= 0  # gates cost, and nothing is skipped
    assert random[0].of("reward") == pytest.approx(np.zeros(6), abs=1e-7)


def test_static_drops_the_least_harmful_layers_first() -> None:
    bench = make_bench()
    order, config = bench.drop_order(), bench.model.config
    assert sorted(order) == [i for i in range(LAYERS) if i not in config.protected_layers]
    curve = bench.static(REWARD)
    assert len(curve) == 1 + 3  # ceil(0.36 · 8) layers
    for count, point in enumerate(curve):
        assert {i for i, rate in enumerate(point.rate_L) if rate == 1} == set(order[:count])
        assert sum(point.rate_L) == count and point.skip == pytest.approx(count / LAYERS)


def made_point(skip: float, gold: float) -> Point:
    figures = np.zeros((len(FIGURES), 2))
    figures[FIGURES.index("places")] = 10
    figures[FIGURES.index("skipped")] = 10 * skip
    figures[FIGURES.index("dnll_gold")] = gold, 3 * gold
    return Point(skip, None, (skip, skip), figures)


def test_equal_skip_lies_on_the_line_between_neighbours() -> None:
    curve = (made_point(0.0, 0.0), made_point(0.4, 0.8), made_point(0.2, 0.1))
    found = at_skip(curve, 0.25)
    assert found is not None and found.skip == pytest.approx(0.25)
    assert found.of("dnll_gold") == pytest.approx([0.275, 0.825])
    exact = at_skip(curve, 0.4)
    assert exact is not None and exact.of("dnll_gold") == pytest.approx([0.8, 2.4])
    assert at_skip(curve, 0.41) is None and at_skip(curve[1:], 0.1) is None


def test_paired_differences_forget_what_questions_have_in_common() -> None:
    draw = np.random.default_rng(0)
    level_Q = draw.normal(0, 10, 400)
    noise_Q = draw.normal(0.5, 1, 400)
    mean, low, high = paired_difference(level_Q + noise_Q, level_Q)
    assert mean == pytest.approx(noise_Q.mean())
    half = 1.96 * noise_Q.std() / 20  # the normal approximation of the same interval
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


# --- the table --------------------------------------------------------------------------------------------


def equal(seed: int, arm: str, gold: float, difference: float | None) -> dict[str, Any]:
    minus = None if difference is None else dict.fromkeys(
        ("dnll_gold", "dnll_self", "reward"), (difference, difference - 0.01, difference + 0.01)
    )  # fmt: skip
    return {
        "kind": "equal", "config": "c", "seed": seed, "step": 4, "arm": arm, "asked": 0.2, "flops_frac": 0.9,
        "dnll_gold": gold, "dnll_self": 0.0, "reward": 0.01, "minus_no_rl": minus,
    }  # fmt: skip


def test_the_table_has_means_ranges_and_the_widest_interval() -> None:
    rows = [equal(seed, "no-RL", 0.1, None) for seed in (0, 1)]
    rows += [equal(0, "PPO", 0.5, 9.0), equal(0, "PPO", 0.06, -0.04), equal(1, "PPO", 0.08, -0.02)]
    stop = {"kind": "stopped", "config": "c", "seed": 1, "step": 3, "reason": "gates collapsed"}
    table = study_tables([*rows, stop])
    line = next(row for row in table.splitlines() if row.startswith("| 20% | PPO |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == "2" and cells[5] == "+0.0700 (0.0600 to 0.0800)"
    assert cells[8] == "-0.0300 [-0.0500, -0.0100]"
    reference = next(row for row in table.splitlines() if row.startswith("| 20% | no-RL |"))
    assert reference.endswith("|  |  |")
    assert "c, seed 1: stopped after 3 updates: gates collapsed" in table


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_folder(folder / "model", "qwen3", vocab=300)
    saveable_tokenizer(size=300).save_pretrained(folder / "model")
    write_questions(folder / "questions.jsonl", 60)
    return folder


def words(root: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model", str(root / "model"), "--updates", "2", "--questions", "4", "--samples", "3", "--tokens", "6",
        "--heldout", "12", "--ratios", "0.1,0.2", "--every", "1", "--device", "cpu", "--batch", "2000",
        "--out", str(out), "--set", f"questions.sources=[{root}/questions.jsonl]",
        "--set", "learner.lr_gates=0.01", "--set", "learner.epochs=1", "--set", "fleet.max_model_len=512", *more,
    ]  # fmt: skip


def test_a_study_of_two_updates(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(words(root, out, "--seeds", "0,1")) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    trials = {(row["config"], row["seed"]) for row in rows}
    assert trials == {(c, s) for c in ("ppo_default", "ppo_paper") for s in (0, 1)}
    updates = [row for row in rows if row["kind"] == "update"]
    assert len(updates) == 8 and max(row["mismatch/flip_rate"] for row in updates) == 0
    assert max(row["mismatch/logp_max"] for row in updates) < 1e-3
    equal_rows = [row for row in rows if row["kind"] == "equal"]
    arms = {row["arm"] for row in equal_rows}
    assert arms >= {"no-RL", "no-RL drawn", "PPO", "PPO drawn", "random", "static", "no-RL layer rates"}  # fmt: skip
    assert all(row["skip"] == pytest.approx(row["asked"]) for row in equal_rows)
    assert len(equal_rows) == 4 * 2 * len(arms)  # nothing is missing at any ratio
    # Every trial begins with the same gates on the same questions, whatever the one before did to them.
    for config in ("ppo_default", "ppo_paper"):
        starts = [
            [row["dnll_gold"] for row in equal_rows if (row["config"], row["seed"], row["arm"]) == (config, s, "no-RL")]
            for s in (0, 1)
        ]  # fmt: skip
        assert starts[0] == starts[1] and len(starts[0]) == 2
    moved = [row["minus_no_rl"]["dnll_gold"][0] for row in equal_rows if row["arm"] == "PPO"]
    assert any(abs(value) > 1e-6 for value in moved)
    assert printed.count("at equal measured skip") == 2 and "| 20% | PPO |" in printed
    assert main(["--table", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_a_start_is_trained_first_and_taken_again(root: Path, tmp_path: Path) -> None:
    """In processes of their own: DeepSpeed joins a process group for good."""
    make_backbone(tmp_path / "backbone")
    make_shards(tmp_path / "shards")
    tree = settings_tree(tmp_path, phases__steps=2)
    del tree["data"], tree["model"]["backbone"]
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(tree))
    given = words(root, tmp_path / "rows.jsonl", "--seeds", "0", "--configs", "ppo_default")[2:]
    given[given.index("fleet.max_model_len=512")] = "fleet.max_model_len=256"
    given += [
        "--stage1", str(tmp_path / "shards"), "--stage1-config", str(tmp_path / "shared.yaml"), "--stage1-set",
        "phases.observe_frac=0.0", "--backbone", str(tmp_path / "backbone"), "--keep", str(tmp_path / "kept"),
        "--set", "questions.max_prompt_tokens=128",
    ]  # fmt: skip
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "fbs_rl.policy_study", *given], capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stderr)
    assert "stage 1: 2/2 loss" in said[0] and "which is there already" in said[1]
    assert FBSConfig.from_pretrained(tmp_path / "kept" / "stage1").gates_origin == "trained"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]
    assert (
        figures[: len(rows) // 2] == figures[len(rows) // 2 :]
    )  # the same start, the same numbers


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--stage1", "data"], "give --model or --stage1, exactly one of them"),
        (["--heldout", "50"], "questions out and 50 are wanted; lower --heldout"),
        (["--seeds", "a"], "--seeds is 'a'; give whole numbers"),
        (["--ratios", "0.2,1.5"], "shares of layers lie between 0 and 1"),
        (["--ratios", "0.99"], "layers may skip, fewer than any of --ratios"),
        (["--set", "episodes.sampled_by=gated"], 'sampled_by is "gated"'),
        (["--set", "learner.rate=1"], "unknown key learner.rate"),
        (["--configs", "ppo_other"], "no such settings file"),
        (["--batch", "0"], "batch_tokens is 0"),
        (["--every", "0"], "--every is 0"),
    ],
)
def test_mistakes_are_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert main(words(root, tmp_path / "rows.jsonl", *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and said[-1].startswith("policy_study: ")
    assert not (tmp_path / "rows.jsonl").exists()


def test_nothing_of_a_cluster_is_imported() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'vllm', 'gymnasium', 'wandb', 'deepspeed', 'pkuseg', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import fbs_rl.policy_study"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
