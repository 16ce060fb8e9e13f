"""Rollouts of one engine against the parallel pass, and against themselves after another history."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fbs_rl.gate_bundle import GateBundle, apply_bundle
from fbs_rl.model.skip_gate import gate_uniform
from fbs_rl.rl.gate_policy import GatePolicy, ProbabilityBound
from fbs_rl.rl.reward import Sampler, SegmentKind
from fbs_rl.rl.rollout import (
    EpisodeRollout,
    RolloutSettings,
    RolloutTask,
    SegmentRollout,
    gate_seed,
)
from fbs_rl.serving.engine_options import EngineOptions, folder_digest
from fbs_rl.serving.rollout_work import RolloutWork
from fbs_rl.serving.rollouts import RolloutEngine
from tests.served_engine import changed_gates, random_prompts
from tests.served_tiny import make_folder, referee
from tests.tiny import NOOP

OPTIONS = EngineOptions(
    max_model_tokens=160, dtype="float32", max_sequences=6, step_tokens=160, kv_cache_gib=0.0625
)
POLICY = GatePolicy(temperature=1.3, low=0.1, high=0.9)
SETTINGS = RolloutSettings(sampled_by=Sampler.GATED, max_new_tokens=24, policy=POLICY)


def make_tasks(count: int, samples: int = 3, first: int = 0) -> list[RolloutTask]:
    """Prompts of 5 to 40 tokens with answers of 1 to 12."""
    prompts = random_prompts(20 + first, [5 + 13 * i % 36 for i in range(count)])
    answers = random_prompts(40 + first, [1 + 5 * i % 12 for i in range(count)])
    return [
        RolloutTask(f"q/{first + i}", tuple(p), tuple(a), tuple(range(7 * i, 7 * i + samples)))
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]


def bits(episodes: Sequence[EpisodeRollout]) -> list[tuple[Any, ...]]:
    """Everything that an episode says, to the last bit; request keys do not count."""
    return [
        (e.question_id, e.sample, e.seed, e.version, *(_segment_bits(s) for s in e.segments))
        for e in episodes
    ]


def _segment_bits(segment: SegmentRollout) -> tuple[Any, ...]:
    wire = segment.trace.to_wire()
    numbers = (segment.nll_gated_N.tobytes(), segment.nll_dense_N.tobytes(), wire.pop("columns"))
    wire.pop("key")
    return (
        str(segment.kind), str(segment.sampled_by), segment.prompt_ids, segment.token_ids, numbers, wire
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    make_folder(place)
    return place


# --- every segment is what the parallel pass says -------------------------------------------------------


def differences(model: Any, episode: EpisodeRollout, settings: RolloutSettings) -> list[str]:
    """What the parallel pass finds otherwise: decisions, probabilities, both NLLs, greedy tokens."""
    wrong = []
    for segment in episode.segments:
        prompt, ids, trace = segment.prompt_ids, segment.token_ids, segment.trace
        skip_TL = torch.from_numpy(trace.skip_TL)
        none_L = skip_TL.new_zeros
        layers = skip_TL.shape[1]
        whole = torch.cat((none_L(len(prompt), layers), skip_TL, none_L(1, layers)))
        replayed = referee(model, prompt, ids, gates="replay", skip=whole.T.unsqueeze(1))
        dense = referee(model, prompt, ids, gates="dense")
        wanted_TL = _decided(model, segment, episode.seed, replayed.prob_TL, settings)
        name = f"{episode.question_id} {episode.sample} {segment.kind}"
        wrong += [f"{name}: decisions"] * (not torch.equal(skip_TL, wanted_TL))
        for part, ours, theirs in (
            ("gated NLL", segment.nll_gated_N, replayed.nll_N),
            ("dense NLL", segment.nll_dense_N, dense.nll_N),
        ):
            worst = float((torch.from_numpy(ours) - theirs).abs().max())
            wrong += [f"{name}: {part} by {worst}"] * (worst > 1e-4)
        greedy = settings.temperature == 0 and segment.kind is SegmentKind.SELF
        chosen = (dense if segment.sampled_by is Sampler.DENSE else replayed).chosen
        wrong += [f"{name}: tokens"] * (greedy and list(ids) != chosen)
    return wrong


def _decided(
    model: Any, segment: SegmentRollout, seed: int, prob_TL: torch.Tensor, settings: RolloutSettings
) -> torch.Tensor:
    """What the settings decide on these probabilities."""
    columns, layers = prob_TL.shape
    forced = sorted(model.config.forced_layers(settings.never_skip))
    if settings.policy is None:
        skip_TL = prob_TL >= settings.tau
    else:
        position_1T = len(segment.prompt_ids) + torch.arange(columns).unsqueeze(0)
        draw = torch.tensor([gate_seed(seed, segment.kind)])
        uniform_LT = gate_uniform(draw, position_1T, torch.arange(layers).view(-1, 1, 1))[:, 0]
        skip_TL = settings.policy.probability(prob_TL) > uniform_LT.T
    skip_TL[:, forced] = False
    return skip_TL


def roll_and_compare(
    folder: Path, settings: RolloutSettings, **model_options: Any
) -> tuple[list[str], list[EpisodeRollout], RolloutWork]:
    model = make_folder(folder, **model_options)
    engine = RolloutEngine.start(str(folder), OPTIONS)
    episodes = engine.roll(make_tasks(4), settings)
    assert pickle.loads(pickle.dumps(bits(episodes))) == bits(pickle.loads(pickle.dumps(episodes)))
    return (
        [line for e in episodes for line in differences(model, e, settings)],
        episodes,
        engine.work,
    )


CASES = {
    "gated, greedy": (SETTINGS, {}),
    "gated, sampled, noop": (
        RolloutSettings(Sampler.GATED, 24, 0.7, POLICY, never_skip=(2, -1)),
        NOOP,
    ),
    "dense, sampled": (RolloutSettings(Sampler.DENSE, 24, 1.0), {}),
    "thresholds, dense, greedy": (RolloutSettings(Sampler.DENSE, 24, policy=None, tau=0.5), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_segments_are_what_the_parallel_pass_says(
    there: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    settings, options = CASES[name]
    wrong, episodes, work = there(roll_and_compare, tmp_path / "model", settings, **options)
    assert wrong == []
    places = [(f"q/{i}", n) for i in range(4) for n in range(3)]
    assert [(e.question_id, e.sample) for e in episodes] == places
    assert [e.seed for e in episodes[:5]] == [0, 1, 2, 7, 8]
    for episode in episodes:
        own, gold = episode.segments
        assert (own.kind, own.sampled_by) == (SegmentKind.SELF, settings.sampled_by)
        assert (gold.kind, gold.sampled_by) == (SegmentKind.GOLD, Sampler.GIVEN)
        assert len(own.token_ids) == 24 and own.trace.gates_on
    skip = np.concatenate([s.trace.skip_TL for e in episodes for s in e.segments])
    assert 0.1 < skip.mean() < 0.8
    # One continuation of the dense model for all three samples, and one NLL pass over it.
    dense = settings.sampled_by is Sampler.DENSE
    assert work.generated_tokens == 24 * (4 if dense else 12)
    distinct = len({e.segments[0].token_ids for e in episodes})
    assert distinct <= 4 if dense else distinct > 4
    gold = sum(len(task.answer_ids) for task in make_tasks(4))
    assert work.scored_tokens == gold * 4 + 24 * (12 + 4 if dense else 12)


# --- a function of the chunk ----------------------------------------------------------------------------


def roll_after_histories(folder: Path, sampled_by: Sampler) -> dict[str, Any]:
    """The same chunk first, again with kept references, after other chunks, and after forgetting."""
    settings = RolloutSettings(sampled_by, 24, 1.0, POLICY)
    chunk, engine = make_tasks(5), RolloutEngine.start(str(folder), OPTIONS)
    found = [bits(engine.roll(chunk, settings))]
    before = engine.work.reused_tokens
    found.append(bits(engine.roll(chunk, settings)))
    reused = engine.work.reused_tokens - before
    engine.roll(make_tasks(3, samples=5, first=50), settings)
    found.append(bits(engine.roll(chunk, settings)))
    engine._references.forget()
    engine._references.limit_tokens = 30
    found.append(bits(engine.roll(chunk, settings)))
    kept = engine.reference_tokens
    other = bits(engine.roll(make_tasks(4), settings))
    return {"found": found, "reused": reused, "kept": kept, "other": other}


@pytest.mark.parametrize("sampled_by", [Sampler.GATED, Sampler.DENSE])
def test_a_chunk_gives_the_same_bits_after_any_history(
    there: Callable[..., Any], folder: Path, sampled_by: Sampler
) -> None:
    done = there(roll_after_histories, folder, sampled_by)
    first, *others = [*done["found"], there(roll_after_histories, folder, sampled_by)["found"][0]]
    assert all(other == first for other in others)
    gold = sum(len(task.answer_ids) for task in make_tasks(5))
    assert done["reused"] == gold + (sampled_by is Sampler.DENSE) * 2 * 24 * 5
    assert 0 < done["kept"] <= 30
    # Of another chunk the same questions differ in their last bits, or the comparison above says nothing.
    assert done["other"] != first[: len(done["other"])]


def roll_after_updates(folder: Path) -> dict[str, Any]:
    model = make_folder(folder)
    engine = RolloutEngine.start(str(folder), OPTIONS)
    settings = RolloutSettings(Sampler.DENSE, 12)
    chunk, seen = make_tasks(3), []
    for bundle in (
        None,
        changed_gates(model, 1),
        changed_gates(model, 2, "gates+paw"),
        GateBundle.of(3, changed_gates(model, 2, "gates+paw").tensors),
    ):
        if bundle is not None:
            engine.update_gates(bundle)
            apply_bundle(dict(model.named_parameters()), bundle)
            model.model.forget_derived()
        kept = engine.reference_tokens
        episodes = engine.roll(chunk, settings)
        wrong = [line for e in episodes for line in differences(model, e, settings)]
        same = bundle is None or (engine.version, engine.digest) == (bundle.version, bundle.digest)
        seen.append((wrong, kept > 0, {e.version for e in episodes}, same))
    return {"seen": seen, "stable": [e.segments[0].nll_dense_N.tobytes() for e in episodes]}


def test_new_gates_keep_dense_references_and_new_previews_void_them(
    there: Callable[..., Any], tmp_path: Path
) -> None:
    seen = there(roll_after_updates, tmp_path / "model")["seen"]
    assert [wrong for wrong, *_ in seen] == [[]] * 4
    assert [kept for _, kept, *_ in seen] == [False, True, False, True]
    assert [versions for *_, versions, _ in seen] == [{0}, {1}, {2}, {3}]
    assert all(same for *_, same in seen)


# --- ends and refusals ----------------------------------------------------------------------------------


def roll_to_ends(folder: Path, sampled_by: Sampler) -> dict[str, Any]:
    """Continuations with the tokens of an unlimited one as end tokens; none at all; answers of one token."""
    engine = RolloutEngine.start(str(folder), OPTIONS)
    chunk = make_tasks(3, samples=2)
    free = engine.roll(chunk, RolloutSettings(sampled_by, 20, policy=POLICY))
    end = free[0].segments[0].token_ids[4]
    ended = engine.roll(chunk, RolloutSettings(sampled_by, 20, policy=POLICY, end_ids=(end, 95)))
    gold = engine.roll(chunk, RolloutSettings(sampled_by, 0, policy=POLICY))
    tokens = [[e.segments[0].token_ids for e in some] for some in (free, ended)]
    return {"end": end, "tokens": tokens, "gold": [[s.kind for s in e.segments] for e in gold]}


@pytest.mark.parametrize("sampled_by", [Sampler.GATED, Sampler.DENSE])
def test_a_continuation_ends_with_its_end_token(
    there: Callable[..., Any], folder: Path, sampled_by: Sampler
) -> None:
    done = there(roll_to_ends, folder, sampled_by)
    ends = {done["end"], 95}
    for free, ended in zip(*done["tokens"], strict=True):
        place = next((i for i, token in enumerate(free) if token in ends), 19)
        assert ended == free[: place + 1]
    assert len(done["tokens"][1][0]) <= 5
    assert done["gold"] == [[SegmentKind.GOLD]] * 6


def refusals(folder: Path) -> list[str]:
    engine = RolloutEngine.start(str(folder), OPTIONS)
    good = make_tasks(2)
    clip = GatePolicy(bound=ProbabilityBound.CLIP)
    long = RolloutTask("set/long", (3,) * 120, (1, 2), (0,))
    alien = RolloutTask("set/alien", (3, 97), (1, 2), (0,))
    asked: list[tuple[list[RolloutTask], RolloutSettings]] = [
        (good, RolloutSettings(policy=clip)),
        ([*good, long], RolloutSettings(max_new_tokens=40)),
        ([*good, alien], SETTINGS),
        (good, RolloutSettings(max_new_tokens=8, never_skip=(8,))),
    ]
    sentences = []
    for chunk, settings in asked:
        try:
            engine.roll(chunk, settings)
            sentences.append("accepted")
        except ValueError as error:
            sentences.append(str(error))
    assert engine.work == RolloutWork() and engine.roll([], SETTINGS) == []
    fits = RolloutTask("set/fits", (3,) * 119, (1, 2), (0,))
    assert len(engine.roll([fits], RolloutSettings(max_new_tokens=40))) == 1
    return sentences


def test_what_cannot_work_is_refused_before_anything_runs(
    there: Callable[..., Any], folder: Path
) -> None:
    clip, long, alien, layer = there(refusals, folder)
    assert clip == 'rollouts draw gates with the bound "mix" only, got "clip"; change it'
    assert long.startswith("question set/long needs 161 tokens (prompt 120, answer 2, continuation")
    assert "max_model_tokens is 160" in long
    assert alien.startswith("question set/alien has token 97, but the model's vocabulary has 97")
    assert "never_skip" in layer


def test_folders_that_cannot_be_rolled_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "plain", gate=False, gates="dense")
    with pytest.raises(ValueError, match="was made without gates; rollouts draw from them"):
        RolloutEngine.start(str(tmp_path / "plain"), OPTIONS)
    with pytest.raises(ValueError, match=r"holds no config\.json with safetensors weights"):
        folder_digest(tmp_path)


def test_a_folder_is_known_by_its_weights(folder: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "same")
    make_folder(tmp_path / "other", tau=0.6)
    assert folder_digest(tmp_path / "same") == folder_digest(folder)
    assert folder_digest(tmp_path / "other") != folder_digest(folder)


@pytest.mark.parametrize(
    "name, value", [("max_model_tokens", 0), ("kv_cache_gib", -1.0), ("step_tokens", 2047)]
)  # fmt: skip
def test_engine_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        EngineOptions(**{name: value})


def test_an_engine_asks_for_the_part_of_a_gpu_that_it_needs(folder: Path) -> None:
    """Weights, cache and a gibibyte to work in; a tiny GPU is not asked for more than nine tenths."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    options, total = EngineOptions(kv_cache_gib=3), 80 * 2**30
    assert options.gpu_share(folder, total) == pytest.approx(
        (weights + 4 * 2**30) / total, abs=5e-4
    )
    assert options.gpu_share(folder, 2**30) == 0.9


def test_seeds_of_a_samples_segments_differ() -> None:
    seeds = {gate_seed(seed, kind) for seed in range(50) for kind in SegmentKind}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds)
