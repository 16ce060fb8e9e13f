"""The decoding environment against the parallel pass, against decode(), and against gymnasium's rules."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs
from envs.agents import FixedAgent, ModelGateAgent, RandomAgent
from envs.decode_env import DecodeEnv
from envs.episode import SegmentTrace
from envs.observation import sign_projection
from envs.rollout import EpisodeRecord, run_episode
from envs.settings import EnvSettings, PolicyCost, RewardAt
from fbs_rl.decoding import decode, token_chooser
from fbs_rl.model.flops import count_trace
from fbs_rl.rl.reward import QualityTokens, RewardSettings, Sampler, SegmentKind
from fbs_rl.types import GateMode
from tests.letters import QUESTIONS, Letters, question
from tests.small_tokenizer import saveable_tokenizer
from tests.text_models import tiny_fbs
from tests.tiny import HIDDEN, LAYERS, NOOP, lively

ID = "fbs_rl/Decode-v0"
NEW = 10
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def env_of(model: Any = None, eos: int | None = None, **settings: Any) -> DecodeEnv:
    chosen = EnvSettings(**{"max_new_tokens": NEW, **settings})
    return DecodeEnv(model or lively(), QUESTIONS, Letters(eos), chosen)


def random_episode(env: DecodeEnv, rate: float = 0.4, **options: Any) -> EpisodeRecord:
    return run_episode(env, RandomAgent.at_rate(env, rate), {"question": 0, **options})


def replayed_nll(model: Any, prompt_ids: tuple[int, ...], trace: SegmentTrace) -> torch.Tensor:
    """NLL of the trace's tokens in one parallel pass with its skips."""
    ids = torch.tensor([[*prompt_ids, *trace.token_ids[:-1]]])
    skip = torch.zeros(LAYERS, *ids.shape, dtype=torch.bool)
    skip[:, 0, len(prompt_ids) :] = trace.skip_LT
    out = model(ids, gates="replay", skip=skip, decode_start=len(prompt_ids))
    log_prob = out.logits[0, len(prompt_ids) - 1 :].double().log_softmax(-1)
    return -log_prob[range(len(trace.token_ids)), list(trace.token_ids)]


# --- gymnasium --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder with its tokenizer."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = saveable_tokenizer()
    tiny_fbs(len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("reward_at", list(RewardAt))
def test_check_env_finds_nothing(folder: str, reward_at: RewardAt) -> None:
    settings = EnvSettings(max_new_tokens=6, temperature=1.0, reward_at=reward_at)
    env = gymnasium.make(
        ID, model=folder, questions=QUESTIONS, settings=settings, render_mode="ansi"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    assert envs.__doc__ is not None and ID in envs.__doc__


def test_import_registers_without_loading_torch() -> None:
    code = (
        f"import sys, gymnasium, envs; print({ID!r} in gymnasium.registry, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("paw", [True, False])
def test_every_observation_is_in_its_space(paw: bool) -> None:
    options = {} if paw else {"paw": False, "gate_inputs": "residual"}
    env = env_of(lively(**options))
    assert ("window" in env.observation_space.spaces) == paw
    observation, info = env.reset(seed=0)
    done, phases = False, []
    while not done:
        assert env.observation_space.contains(observation)
        assert observation["phase"] == ["decode", "gold"].index(info["phase"])
        phases.append(info["phase"])
        observation, _, done, _, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation) and observation["progress"] == 1
    assert phases == sorted(phases) and set(phases) == {"decode", "gold"}


def test_observation_is_what_a_dense_pass_knows_about_the_token_before() -> None:
    env, model = env_of(state_features=5), lively()
    seen = [env.reset(options={"question": 0})[0]]
    for _ in range(4):
        seen.append(env.step(np.zeros(LAYERS, np.int8))[0])
    prompt = env.encoded[0].prompt_ids
    tokens = [int(o["token"]) for o in seen]
    out = model(torch.tensor([[*prompt, *tokens]]))
    at = slice(len(prompt) - 1, -1)
    log_prob = out.logits[0, at].double().log_softmax(-1)
    entropy = -(log_prob.exp() * log_prob).sum(-1)
    states = model.model.run(torch.tensor([[*prompt, *tokens]]), _dense(model)).state_BTd[0]
    now, before = states[at], states[len(prompt) - 2 : -2]
    cosine = torch.cosine_similarity(now, before)
    moved = (now - before).norm(dim=-1) / before.norm(dim=-1)
    wanted = {
        "token_nll": -log_prob[range(5), tokens],
        "entropy": entropy,
        "window": out.lookahead[:, 0, at].T,
        "motion": torch.stack((moved, cosine), -1),
    }
    for name, values in wanted.items():
        found = np.stack([o[name] for o in seen]).squeeze()
        np.testing.assert_allclose(found, values.squeeze().detach(), atol=2e-5, err_msg=name)
    assert [float(o["progress"][0]) for o in seen] == pytest.approx([i / 9 for i in range(5)])
    signs = sign_projection(5, HIDDEN)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    features = (now / now.norm(dim=-1, keepdim=True)) @ signs.T
    found = np.stack([o["state"] for o in seen])
    np.testing.assert_allclose(found, features.detach(), atol=2e-5)


def _dense(model: Any) -> Any:
    return model._request(
        torch.zeros(1, 1), None, None, GateMode.DENSE, None, None, None, None, 1.0, ()
    )


# --- one semantics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NOOP])
def test_nlls_are_those_of_the_parallel_pass_with_the_same_skips(options: dict[str, str]) -> None:
    model = lively(**options)
    env = env_of(model)
    record = random_episode(env)
    prompt = env.encoded[0].prompt_ids
    assert [trace.kind for trace in record.traces] == [SegmentKind.SELF, SegmentKind.GOLD]
    for trace, outcome in zip(record.traces, record.outcomes, strict=True):
        assert trace.skip_LT.any() and trace.columns == len(trace.token_ids) - 1
        wanted = replayed_nll(model, prompt, trace)
        torch.testing.assert_close(trace.nll_gated_N, wanted, atol=1e-5, rtol=1e-5)
        nothing = SegmentTrace(
            trace.kind, trace.sampled_by, trace.prompt_tokens, trace.token_ids, trace.nll_gated_N,
            torch.zeros_like(trace.skip_LT),
        )  # fmt: skip
        dense = replayed_nll(model, prompt, nothing)
        torch.testing.assert_close(outcome.nll_dense_N, dense, atol=1e-5, rtol=1e-5)
    assert record.traces[1].token_ids == env.encoded[0].answer_ids
    # Greedy: every token of the continuation is the best one under its skips.
    self_trace = record.traces[0]
    assert len(self_trace.token_ids) == NEW and self_trace.sampled_by is Sampler.GATED


@pytest.mark.parametrize("options", [{}, NOOP, {"gate_block": 2}])
def test_own_gate_replayed_as_actions_is_the_same_episode_and_that_of_decode(
    options: dict[str, Any],
) -> None:
    model = lively(**options)
    env = env_of(model)
    agent = ModelGateAgent("gate", env, tau=0.5)
    record = run_episode(env, agent, {"question": 2})
    assert 0.1 < np.stack(record.executed).mean() < 0.9

    again = env_of(model)
    _, info = again.reset(options={"question": 2, "policy_cost": PolicyCost.GATES})
    rewards = []
    for action in record.executed:
        _, reward, _, _, info = again.step(action)
        assert np.array_equal(info["executed"], action)
        rewards.append(reward)
    assert again.traces[0].token_ids == record.traces[0].token_ids
    for one, other in zip(again.traces, record.traces, strict=True):
        assert torch.equal(one.nll_gated_N, other.nll_gated_N)
    assert tuple(rewards) == record.rewards and info["reward_terms"]["total"] != 0

    made = decode(
        model, env.encoded[2].prompt_ids, NEW, token_chooser(0.0, 1.0, 0), mode=GateMode.THRESHOLD,
        tau=0.5,
    )  # fmt: skip
    assert tuple(made.token_ids) == record.traces[0].token_ids
    assert torch.equal(made.skip_LT, record.traces[0].skip_LT)
    chunks = (x if x is None else x[None] for x in (made.closed_chunks_T, made.opens_T))
    start = torch.tensor([made.prompt_tokens])
    cost = count_trace(model.config, made.skip_LT[:, None], start, True, *chunks)
    assert torch.equal(cost.flops_BT[0], record.outcomes[0].flops_T)
    assert torch.equal(cost.dense_flops_BT[0], record.outcomes[0].dense_flops_T)


def test_what_is_executed_leaves_layers_that_never_skip_alone() -> None:
    env = env_of(never_skip=(5, -1))
    env.reset(options={"question": 1})
    _, _, _, _, info = env.step(np.ones(LAYERS, np.int8))
    always = sorted({2, 5, LAYERS - 1})  # the boundary layer is 2
    assert info["overruled"].tolist() == always
    assert np.flatnonzero(info["executed"] == 0).tolist() == always


# --- reward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward_at", list(RewardAt))
@pytest.mark.parametrize("options", [{}, NOOP])
def test_never_skipping_earns_nothing(options: dict[str, str], reward_at: RewardAt) -> None:
    env = env_of(lively(**options), reward_at=reward_at)
    record = run_episode(env, FixedAgent.never(env), {"question": 0})
    assert record.reward.compute_term == 0
    assert abs(record.reward.nll_increase) < 1e-6
    assert np.abs(record.rewards).max() < 1e-6


def test_skipping_all_that_may_skip_changes_the_nll() -> None:
    env = env_of()
    record = run_episode(env, FixedAgent.skipping(env, range(LAYERS)), {"question": 0})
    for outcome in record.outcomes:
        assert (outcome.nll_gated_N - outcome.nll_dense_N)[1:].abs().min() > 1e-3
        assert outcome.nll_gated_N[0] == pytest.approx(float(outcome.nll_dense_N[0]), abs=1e-6)
    assert record.reward.compute_term > 0.03 and record.reward.quality_term != 0


@pytest.mark.parametrize("reward_at", list(RewardAt))
@pytest.mark.parametrize("quality", list(QualityTokens))
@pytest.mark.parametrize("cost", list(PolicyCost))
def test_rewards_add_up_to_beta_saved_minus_lambda_increase(
    reward_at: RewardAt, quality: QualityTokens, cost: PolicyCost
) -> None:
    weights = RewardSettings(beta=0.3, lam=0.2, quality=quality)
    env = env_of(reward=weights, reward_at=reward_at)
    record = random_episode(env, policy_cost=cost)
    executed = sum(float(o.flops_T.sum()) for o in record.outcomes)
    dense = sum(float(o.dense_flops_T.sum()) for o in record.outcomes)
    own, gold = record.outcomes
    drift = (own.nll_dense_N - own.nll_gated_N, gold.nll_gated_N - gold.nll_dense_N)
    worse = [penalty_N.clamp(-1, 5) for penalty_N in drift]
    scored = torch.cat(worse) if quality is QualityTokens.GOLD_AND_SELF else worse[1]
    total = 0.3 * (1 - executed / dense) - 0.2 * float(scored.mean())
    assert sum(record.rewards) == pytest.approx(total, abs=1e-12)
    if reward_at is RewardAt.END:
        assert set(record.rewards[:-1]) == {0.0}
    else:
        assert min(np.abs(record.rewards[:-1])) > 0


def test_gates_are_paid_for_once_a_column() -> None:
    env = env_of()
    free, paid = (random_episode(env, policy_cost=cost) for cost in PolicyCost)
    for one, other in zip(free.outcomes, paid.outcomes, strict=True):
        extra = other.flops_T - one.flops_T
        assert len(set(extra.tolist())) == 1 and extra[0] > 0
        assert torch.equal(one.dense_flops_T, other.dense_flops_T)


def test_token_rewards_are_the_shares_where_those_are_known() -> None:
    env = env_of(lively(chunk=False), reward_at=RewardAt.TOKEN)
    record = random_episode(env)
    shares, compute = record.reward.shares, record.reward.compute_shares
    own = len(shares[0])
    paid = np.array(record.rewards)
    np.testing.assert_allclose(paid[: own - 1], compute[0][:-1], atol=1e-8)
    last = compute[0][-1] + record.reward.quality_shares[0].sum()
    assert paid[own - 1] == pytest.approx(float(last), abs=1e-9)
    np.testing.assert_allclose(paid[own:], shares[1], atol=1e-9)


def test_token_rewards_do_not_know_the_future() -> None:
    env = env_of(reward_at=RewardAt.TOKEN)
    first = random_episode(env)
    env.reset(options={"question": 0})
    for column, action in enumerate(first.executed):
        flipped = action if column < 5 else 1 - action
        _, reward, _, _, _ = env.step(flipped)
        assert (reward == first.rewards[column]) == (column < 5)
        if column == 6:
            break


# --- ends and starts --------------------------------------------------------------------------------


def test_end_of_text_ends_the_first_phase_and_the_gold_answer_the_episode() -> None:
    made = random_episode(env_of()).traces[0].token_ids
    for place in (0, 3):
        eos = made[place]
        length = made.index(eos) + 1
        env = env_of(eos=eos, reward_at=RewardAt.TOKEN)
        record = random_episode(env)
        assert record.traces[0].token_ids == made[:length]
        assert len(record.rewards) == length - 1 + len(env.encoded[0].answer_ids) - 1
        assert sum(record.rewards) == pytest.approx(record.reward.total, abs=1e-12)
    env = env_of(eos=made[0])
    _, info = env.reset(options={"question": 0})
    assert info["phase"] == "gold"


def test_only_a_limit_on_steps_truncates() -> None:
    env = env_of()
    _, info = env.reset(options={"question": 0})
    ends, columns = [], NEW - 1 + len(env.encoded[0].answer_ids) - 1
    for _ in range(columns):
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        ends.append((terminated, truncated))
    assert set(ends[:-1]) == {(False, False)} and ends[-1] == (True, False)
    assert info["stop"] == "length" and info["column"] == columns
    limited = env_of(max_steps=3)
    limited.reset(seed=1)
    ends = [limited.step(limited.action_space.sample())[2:] for _ in range(3)]
    assert [e[:2] for e in ends] == [(False, False), (False, False), (False, True)]
    assert "reward_terms" not in ends[-1][2]
    for over in (env, limited, env_of()):
        with pytest.raises(gymnasium.error.ResetNeeded):
            over.step(env.action_space.sample())
    with pytest.raises(ValueError, match="cut off after 3 columns"):
        random_episode(limited)


def test_draws_follow_from_seeds() -> None:
    env = env_of(temperature=1.0)
    agent = RandomAgent.at_rate(env, 0.2)
    one, same, other = (run_episode(env, agent, seed=seed) for seed in (3, 3, 5))
    assert one.traces[0].token_ids == same.traces[0].token_ids
    assert one.rewards == same.rewards
    assert one.traces[0].token_ids != other.traces[0].token_ids
    drawn = {random_episode(env, token_seed=s).traces[0].token_ids for s in (1, 2, 1)}
    assert len(drawn) == 2
    seen = {env.reset(seed=seed)[1]["question"] for seed in range(12)}
    assert seen == {q.id for q in QUESTIONS}


def test_render_shows_both_texts() -> None:
    env = DecodeEnv(lively(), QUESTIONS, Letters(), EnvSettings(max_new_tokens=4), "ansi")
    assert env.render() is None
    record = random_episode(env)
    shown = env.render()
    assert shown is not None and "\x1b[" in shown
    text = Letters().decode(record.traces[0].token_ids)
    assert ESCAPE.sub("", shown) == f"self: {text}\ngold: {QUESTIONS[0].answer}"
    assert env_of().render() is None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"model": tiny_fbs(300, gate=False)}, "all 8 layers of this model always run"),
        ({"questions": ()}, "no questions were given"),
        ({"questions": [question(0, "x" * 120, " ab")]}, "needs 130 tokens"),
        ({"questions": [question(7, "x", "y")]}, "answer of question set/7 has 1 token"),
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"render_mode": "human"}, 'it can be "ansi"'),
    ],
)
def test_mistakes_are_named_when_the_environment_is_made(
    made: dict[str, Any], message: str
) -> None:
    given = {"model": lively(), "questions": QUESTIONS, "tokenizer": Letters(), **made}
    with pytest.raises(ValueError, match=re.escape(message)):
        DecodeEnv(settings=EnvSettings(max_new_tokens=NEW), **given)


def test_mistakes_in_calls_are_named() -> None:
    env = env_of()
    for options, message in (
        ({"questions": 1}, "no option 'questions'"),
        ({"question": 3}, "give 0 to 2"),
        ({"policy_cost": "free"}, "free"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)
    env.reset()
    wrong_actions: list[Any] = [np.zeros(3), np.full(LAYERS, 2), np.full(LAYERS, 0.5)]
    for action in wrong_actions:
        with pytest.raises(ValueError, match="8 numbers of 0 and 1"):
            env.step(action)
    with pytest.raises(ValueError, match="not finished"):
        env.outcomes()
    values = (("max_new_tokens", 0), ("temperature", -1), ("temperature", np.nan), ("max_steps", 0))
    for name, value in values:
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=name):
            EnvSettings(**wrong)
