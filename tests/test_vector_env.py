"""The vector environment on a real fleet against the single environment, and against gymnasium's rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import ray
import torch
from gymnasium.envs.registration import EnvSpec

from actors.fleet import FleetSettings, RolloutFleet
from actors.gang import RankResources
from envs.decode_env import DecodeEnv
from envs.settings import EnvSettings, PolicyCost
from envs.vector_env import FleetVectorEnv
from fbs_rl.rl.credit import score_episode
from fbs_rl.rl.questions import EncodedQuestion
from fbs_rl.rl.reward import RewardSettings, Sampler
from fbs_rl.rl.rollout import EpisodeRollout, RolloutSettings, RolloutTask
from tests.letters import Letters, question
from tests.ray_cluster import LocalCluster
from tests.served_engine import random_prompts
from tests.served_tiny import make_folder
from tests.test_rollouts import OPTIONS, bits

NEW = 16
END = 7
ROLLOUT = RolloutSettings(sampled_by=Sampler.GATED, max_new_tokens=NEW, end_ids=(END,))
REWARD = RewardSettings(beta=0.2, lam=0.3)
PROMPTS, ANSWERS = random_prompts(60, [6, 17, 30]), random_prompts(61, [2, 9, 5])
QUESTIONS = tuple(
    EncodedQuestion(f"set/{i}", tuple(p), tuple(a))
    for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_folder(folder)


@pytest.fixture(scope="module")
def fleet(ray_cluster: LocalCluster, model: tuple[Path, Any]) -> Iterator[RolloutFleet]:
    ray.shutdown()  # an earlier module's commands may have left this process connected
    ray.init(ray_cluster.environment["RAY_ADDRESS"], log_to_driver=False)
    settings = FleetSettings(workers=1, resources=RankResources(1), start_deadline_s=300)
    with RolloutFleet.start("vector", str(model[0]), OPTIONS, settings) as made:
        yield made
    ray.shutdown()


def vector_env(fleet: Any, model: Any, num_envs: int = 5, **options: Any) -> FleetVectorEnv:
    chosen = {"rollout": ROLLOUT, "reward": REWARD, "chunk_questions": 2, **options}
    return FleetVectorEnv(fleet, model.config, QUESTIONS, num_envs, **chosen)


def zeros(env: FleetVectorEnv) -> np.ndarray:
    return np.zeros(env.num_envs, np.int64)


# --- the single environment says the same ---------------------------------------------------------------


def single_env(model: Any) -> DecodeEnv:
    settings = EnvSettings(max_new_tokens=NEW, reward=REWARD, policy_cost=PolicyCost.GATES)
    texts = [question(i, "?", "!") for i in range(len(QUESTIONS))]  # only their ids are read
    by_id = {f"set/{i}": encoded for i, encoded in enumerate(QUESTIONS)}
    return DecodeEnv(model, texts, Letters(END), settings, encode=lambda q, _: by_id[q.id])


def replay(env: DecodeEnv, episode: EpisodeRollout) -> dict[str, Any]:
    """The last info of the episode with the fleet's skips as explicit actions."""
    terminated, (_, info) = (
        False,
        env.reset(options={"question": int(episode.question_id.split("/")[1])}),
    )
    for segment in episode.segments:
        for skip_L in segment.trace.skip_TL:
            _, _, terminated, _, info = env.step(skip_L.astype(np.int8))
            assert len(info["overruled"]) == 0
    assert terminated
    return info


def test_the_single_environment_replays_the_fleets_episodes(
    fleet: RolloutFleet, model: tuple[Path, Any]
) -> None:
    env, single = vector_env(fleet, model[1]), single_env(model[1])
    env.reset(seed=3, options={"questions": [0, 1, 2, 1, 0]})
    _, rewards, terminated, truncated, infos = env.step(zeros(env))
    assert terminated.all() and not truncated.any()
    last = infos["final_info"]
    assert infos["final_obs"].tolist() == [0, 1, 2, 1, 0]
    skipped = []
    for i, episode in enumerate(last["episode"]):
        info = replay(single, episode)
        traces = single.traces
        outcomes = [segment.outcome(model[1].config) for segment in episode.segments]
        for segment, trace, ours, theirs in zip(
            episode.segments, traces, outcomes, single.outcomes(), strict=True
        ):
            assert segment.token_ids == trace.token_ids
            assert torch.equal(torch.from_numpy(segment.trace.skip_TL).T, trace.skip_LT)
            assert torch.equal(ours.flops_T, theirs.flops_T)
            assert torch.equal(ours.dense_flops_T, theirs.dense_flops_T)
            torch.testing.assert_close(ours.nll_gated_N, theirs.nll_gated_N, rtol=0, atol=1e-4)
            torch.testing.assert_close(ours.nll_dense_N, theirs.nll_dense_N, rtol=0, atol=1e-4)
            skipped.append(segment.trace.skip_TL.mean())
        for name, value in info["reward_terms"].items():
            assert last["reward_terms"][name][i] == pytest.approx(value, abs=1e-6), name
        assert rewards[i] == last["reward_terms"]["total"][i]
        shares = score_episode(episode, model[1].config, REWARD).reward.shares
        for ours, theirs in zip(shares, info["reward_shares"].values(), strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-5)
    assert 0.1 < np.mean(skipped) < 0.8
    assert len(set(rewards.tolist())) == 5  # questions that come twice have other draws


# --- gymnasium ------------------------------------------------------------------------------------------


def test_steps_are_episodes_and_a_function_of_the_seed(
    fleet: RolloutFleet, model: tuple[Path, Any]
) -> None:
    def three_steps(seed: int) -> list[Any]:
        env = vector_env(fleet, model[1], num_envs=3)
        observation, info = env.reset(seed=seed)
        seen = []
        for _ in range(3):
            assert env.observation_space.contains(observation)
            assert info["question"].tolist() == [f"set/{i}" for i in observation]
            asked = observation
            observation, rewards, *_, info = env.step(env.action_space.sample())
            episodes = info["final_info"]["episode"]
            assert info["final_info"]["question"].tolist() == [f"set/{i}" for i in asked]
            assert [e.question_id for e in episodes] == [f"set/{i}" for i in asked]
            seen.append((asked.tolist(), rewards.tolist(), bits(episodes)))
        return seen

    first = three_steps(5)
    assert three_steps(5) == first
    assert three_steps(6) != first
    assert len({str(step[0]) for step in first}) > 1


def test_make_vec_gives_it(fleet: RolloutFleet, model: tuple[Path, Any]) -> None:
    spec = EnvSpec("fbs_rl/Decode-v0", vector_entry_point="envs.vector_env:FleetVectorEnv")
    options = {
        "fleet": fleet,
        "config": model[1].config,
        "questions": QUESTIONS,
        "rollout": ROLLOUT,
    }
    env = gymnasium.make_vec(spec, num_envs=2, **options)
    assert isinstance(env.unwrapped, FleetVectorEnv)
    env.reset(seed=0)
    rewards = env.step(env.action_space.sample())[1]
    assert rewards.shape == (2,) and np.isfinite(rewards).all()
    env.close()
    assert len(fleet.roll([_tasks()], ROLLOUT)[0]) == 1  # the fleet is not the environment's


def _tasks() -> list[RolloutTask]:
    first = QUESTIONS[0]
    return [RolloutTask(first.id, first.prompt_ids, first.answer_ids, (0,))]


# --- refusals: a hand-made fleet that fails -------------------------------------------------------------


class NoFleet:
    """Fails, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def roll(
        self, chunks: Sequence[Sequence[RolloutTask]], settings: RolloutSettings
    ) -> list[list[EpisodeRollout]]:
        self.asked.append([list(chunk) for chunk in chunks])
        raise TimeoutError("no worker")


def test_a_step_that_failed_can_be_repeated(model: tuple[Path, Any]) -> None:
    fleet = NoFleet()
    env = vector_env(fleet, model[1])
    env.reset(seed=1)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            env.step(zeros(env))
    assert fleet.asked[0] == fleet.asked[1]
    assert [len(chunk) for chunk in fleet.asked[0]] == [2, 2, 1]
    assert len({task.seeds for chunk in fleet.asked[0] for task in chunk}) == 5


def test_mistakes_are_refused(model: tuple[Path, Any]) -> None:
    env = vector_env(NoFleet(), model[1], num_envs=2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(zeros(env))
    with pytest.raises(ValueError, match="reset has no option 'question'; it has questions"):
        env.reset(options={"question": [0, 0]})
    for wrong in ([0, 3], [0], [-1, 0]):
        with pytest.raises(ValueError, match="questions are 2 indices from 0 to 2, got"):
            env.reset(options={"questions": wrong})
    with pytest.raises(ValueError, match="give one seed, or None"):
        env.reset(seed=[1, 2])
    env.reset()
    with pytest.raises(
        ValueError, match="the actions are 2 zeros, since the model's own gates act"
    ):
        env.step(np.ones(2, np.int64))
    with pytest.raises(ValueError, match="no questions were given"):
        FleetVectorEnv(NoFleet(), model[1].config, ())
    with pytest.raises(ValueError, match="num_envs is 0 and chunk_questions 8"):
        FleetVectorEnv(NoFleet(), model[1].config, QUESTIONS, num_envs=0)
