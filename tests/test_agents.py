"""Baseline agents: what they skip, what the comparison says of them, and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from envs.agents import (
    Agent,
    FixedAgent,
    ModelGateAgent,
    RandomAgent,
    decode_env,
    free_layers,
    spread_layers,
)
from envs.compare import KINDS, AgentSpec, main, table
from envs.decode_env import DecodeEnv
from envs.entropy_agent import EntropyAgent, EntropyClassifier, column_features, dense_columns
from envs.rollout import compare_agents, run_episode
from envs.settings import EnvSettings, PolicyCost
from fbs_rl.checkpoint import load_model
from fbs_rl.rl.question_pool import build_pool, default_pool
from fbs_rl.seeds import stable_hash
from fbs_rl.types import GateMode
from tests.letters import QUESTIONS, Letters
from tests.small_tokenizer import saveable_tokenizer
from tests.text_models import tiny_fbs
from tests.tiny import lively

NEW = 8


def env_of(**settings: Any) -> DecodeEnv:
    return DecodeEnv(
        lively(), QUESTIONS, Letters(), EnvSettings(**{"max_new_tokens": NEW, **settings})
    )


def actions_of(env: DecodeEnv, agent: Agent, question: int = 0) -> np.ndarray[Any, Any]:
    return np.stack(run_episode(env, agent, {"question": question}).executed)


def test_fixed_agents_skip_what_they_name() -> None:
    env = env_of()
    assert actions_of(env, FixedAgent.never(env)).sum() == 0
    skipped = actions_of(env, FixedAgent.skipping(env, (3, 6)))
    assert set(map(tuple, skipped.tolist())) == {(0, 0, 0, 1, 0, 0, 1, 0)}
    with pytest.raises(ValueError, match="no layer 8; the model has layers 0 to 7"):
        FixedAgent.skipping(env, (8,))


def test_spread_layers_have_the_ratio_and_never_name_a_protected_layer() -> None:
    env = env_of(never_skip=(0,))
    assert free_layers(env) == (1, 3, 4, 5, 6, 7)
    assert spread_layers(env, 0.75) == free_layers(env)
    assert spread_layers(env, 0.375) == (3, 5, 7)
    for ratio, message in ((0.8, "more than the layers that may skip"), (0.01, "less than half")):
        with pytest.raises(ValueError, match=message):
            spread_layers(env, ratio)


def test_random_agent_keeps_its_rate_over_all_layers_and_its_draws() -> None:
    env = env_of()
    agent = RandomAgent.at_rate(env, 0.36)
    drawn = np.stack([agent.act({}, {"question": "q", "column": i}) for i in range(3000)])
    assert drawn.mean() == pytest.approx(0.36, abs=0.01)
    assert drawn[:, 2].sum() == 0  # the boundary layer
    assert np.array_equal(actions_of(env, agent), actions_of(env_of(), agent))
    other = RandomAgent.at_rate(env, 0.36, seed=1)
    assert not np.array_equal(actions_of(env, agent), actions_of(env, other))


@pytest.mark.parametrize("mode", [GateMode.THRESHOLD, GateMode.SAMPLE])
def test_the_gate_agent_decides_as_the_model_inside_its_step(mode: GateMode) -> None:
    env, model = env_of(), lively()
    agent = ModelGateAgent("gate", env, mode, 0.5, seed=4)
    record = run_episode(env, agent, {"question": 1})
    prompt = env.encoded[1].prompt_ids
    for trace, phase in zip(record.traces, ("decode", "gold"), strict=True):
        # The parallel pass, deciding by itself about the same tokens with the same noise.
        ids = torch.tensor([[*prompt, *trace.token_ids[:-1]]])
        noise = stable_hash(4, "gate", QUESTIONS[1].id, phase)
        out = model(ids, gates=mode, tau=0.5, gate_seed=noise, decode_start=len(prompt))
        assert torch.equal(out.skip[:, 0, len(prompt) :], trace.skip_LT)
        assert 0.1 < trace.skip_LT.float().mean() < 0.9
    assert env.policy_cost is PolicyCost.GATES


def test_agents_work_through_wrappers_and_not_without_the_environment() -> None:
    wrapped = gymnasium.wrappers.RecordEpisodeStatistics(env_of())
    record = run_episode(wrapped, FixedAgent.never(decode_env(wrapped)), {"question": 1})
    assert record.agent == "never" and record.question == QUESTIONS[1].id
    with pytest.raises(ValueError, match="needs a DecodeEnv"):
        decode_env(gymnasium.make("CartPole-v1"))


# --- the entropy classifier -------------------------------------------------------------------------


def test_the_classifier_finds_what_decides_the_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(4200, 6, generator=draw) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    entropy = 2 + 0.05 * (features[:, 1] - 3) + 0.01 * torch.randn(4200, generator=draw)
    made = EntropyClassifier.fit(features[:4000], entropy[:4000], 0.3)
    assert (entropy[:4000] <= made.limit).float().mean() == pytest.approx(0.3, abs=0.01)
    easy = made.probability(features[4000:]) >= 0.5
    assert (easy == (entropy[4000:] <= made.limit)).float().mean() > 0.95
    assert made.weight_F.abs().argmax() == 1 and made.weight_F[1] < 0
    with pytest.raises(ValueError, match="teach no difference"):
        EntropyClassifier.fit(features, torch.ones(4200), 0.3)


def test_the_entropy_agent_skips_its_layers_where_it_expects_little() -> None:
    env = env_of()
    agent = EntropyAgent.fit(env, [0, 2], (3, 6))
    features, entropies = dense_columns(env, [0, 2])
    answers = sum(len(env.encoded[i].answer_ids) - 1 for i in (0, 2))
    assert len(features) == len(entropies) == answers + 2 * (NEW - 2)
    expected = agent.classifier.probability(features) >= 0.5
    easy = entropies <= agent.classifier.limit
    assert (expected == easy).float().mean() > 0.7  # on what it was fitted to
    # What it does is what the classifier says of the observations, phase by phase.
    observation, info = env.reset(options={"question": 0})
    before, phase, done, seen = None, info["phase"], False, set()
    while not done:
        before = before if info["phase"] == phase else None
        phase = info["phase"]
        said = bool(agent.classifier.probability(column_features(before, observation)) >= 0.5)
        action = agent.act(observation, info)
        assert action.tolist() == [0, 0, 0, said, 0, 0, said, 0]
        seen.add(said)
        before = observation
        observation, _, done, _, info = env.step(action)
    assert seen == {True, False}


@pytest.mark.real_weights
def test_entropy_can_be_expected_from_the_states_of_a_real_model() -> None:
    loaded = load_model("smollm2-135m", dtype=torch.float32)
    pool, encoded = default_pool().encode(loaded.tokenizer, 64)
    questions = [q for q in pool.batch(0, len(pool.train)) if len(encoded[q.id].answer_ids) > 4][:5]
    env = DecodeEnv(
        loaded.model, questions, loaded.tokenizer, EnvSettings(max_new_tokens=12),
        encode=lambda q, _: encoded[q.id],
    )  # fmt: skip
    agent = EntropyAgent.fit(env, range(3), spread_layers(env, 0.3))
    features, entropies = dense_columns(env, [3, 4])
    expected = agent.classifier.probability(features)
    easy = entropies <= agent.classifier.limit
    wins = (expected[easy][:, None] > expected[~easy]).float().mean()
    assert wins > 0.6  # the area under the curve, on questions that it was not fitted on


# --- comparison -------------------------------------------------------------------------------------


def test_rows_are_sums_and_means_over_the_episodes() -> None:
    env = env_of()
    agents = [FixedAgent.never(env), RandomAgent.at_rate(env, 0.5)]
    records: list[Any] = []
    never, half = compare_agents(env, agents, [0, 2], on_episode=records.append)
    assert [r.agent for r in records] == ["never", "never", "random:0.5", "random:0.5"]
    assert never.skip_ratio == 0 and never.executed_frac == 1 and never.episodes == 2
    one, two = records[2:]
    skips = torch.cat([trace.skip_LT for record in (one, two) for trace in record.traces], 1)
    assert half.columns == skips.shape[1]
    assert half.skip_ratio == pytest.approx(float(skips.float().mean()))
    assert half.reward == pytest.approx((one.reward.total + two.reward.total) / 2)
    assert half.reward == pytest.approx(half.compute_term + half.quality_term)
    assert 0.4 < half.executed_frac < 0.9
    assert table([never, half]).row_count == 2


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    root = tmp_path_factory.mktemp("compare")
    tokenizer = saveable_tokenizer()
    tiny_fbs(len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(8)]
    source = root / "sums.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    build_pool([str(source)]).write(root / "pool")
    yield {"model": str(root / "model"), "pool": str(root / "pool")}


def run_main(places: dict[str, str], *words: str) -> int:
    return main(
        ["--model", places["model"], "--pool", places["pool"], "--max-new-tokens", "6", *words]
    )


def test_the_command_compares_agents(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = "never,random:0.36,static:0.25,static:3+5,gate:0.5,sample:1,entropy:0.5"
    assert run_main(places, "--agents", words, "--questions", "2", "--json") == 0
    rows = {row["agent"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == words.split(",")
    assert rows["never"]["executed_frac"] == 1 and abs(rows["never"]["reward"]) < 1e-6
    assert rows["static:0.25"]["skip_ratio"] == rows["static:3+5"]["skip_ratio"] == 0.25
    assert all(row["episodes"] == 2 for row in rows.values())
    assert run_main(places, "--agents", "never", "--questions", "1") == 0
    assert "C/C_full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--agents", "always"), "--agents names 'always'"),
        (("--agents", "random:much"), "whose value is no number"),
        (("--agents", "static:30+1"), "no layer 30"),
        (("--questions", "0"), "need at least 1"),
        (("--questions", "500"), "500 questions are needed"),
        (("--questions", "7", "--agents", "entropy"), "(4 of them to fit on)"),
        (("--lam", "-1"), "lam is -1"),
        (("--steps", "4"), "--help lists all options"),
    ],
)
def test_the_command_names_mistakes(
    places: dict[str, str], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert run_main(places, *words) == 2
    assert message in capsys.readouterr().err


def test_every_kind_of_agent_has_a_default() -> None:
    env = env_of()
    made = [AgentSpec.parse(kind).build(env, [0, 2]) for kind in KINDS]
    assert [agent.name.split(":")[0] for agent in made] == list(KINDS)
