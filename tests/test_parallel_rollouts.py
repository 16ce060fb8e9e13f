"""Parallel rollouts against the engine's, against the parallel pass of one row, and as food for the learner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fbs_rl.config import from_tree
from fbs_rl.model import FBSForCausalLM
from fbs_rl.rl.dense_continuations import write_greedily
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.gated_continuations import write_gated
from fbs_rl.rl.learner import PPOLearner
from fbs_rl.rl.learner_settings import LearnerSettings, MismatchLimits
from fbs_rl.rl.parallel_pass import (
    GivenText,
    cut_texts,
    dense_gates,
    drawn_gates,
    fixed_gates,
    pass_texts,
    threshold_gates,
    token_nll,
)
from fbs_rl.rl.parallel_rollouts import ParallelRollouts
from fbs_rl.rl.reward import Sampler, SegmentKind
from fbs_rl.rl.rollout import EpisodeRollout, RolloutSettings, RolloutTask, gate_seed
from fbs_rl.serving.rollouts import RolloutEngine
from tests.engine_process import engine_process
from tests.served_tiny import make_folder
from tests.test_rollouts import OPTIONS, differences, make_tasks
from tests.tiny import NOOP, VOCAB, lively

POLICY = GatePolicy(temperature=1.3, low=0.1, high=0.9)
DRAWN = RolloutSettings(Sampler.DENSE, 24, policy=POLICY)
GATED = replace(DRAWN, sampled_by=Sampler.GATED)
THRESHOLD = RolloutSettings(Sampler.DENSE, 24, policy=None, tau=0.5)


@pytest.fixture(scope="module")
def there() -> Iterator[Callable[..., Any]]:
    with engine_process() as run:
        yield run


# --- the same episodes as an engine's ------------------------------------------------------------------


def engine_and_parallel(
    folder: Path, settings: RolloutSettings, **options: Any
) -> tuple[list[EpisodeRollout], list[EpisodeRollout]]:
    model = make_folder(folder, **options)
    tasks = make_tasks(5)
    served = RolloutEngine.start(str(folder), OPTIONS).roll(tasks, settings)
    return served, ParallelRollouts(model, 150).roll(tasks, settings)


CASES = {
    "drawn": (DRAWN, {}),
    "drawn, noop, blocks, more layers that always run": (
        replace(DRAWN, never_skip=(2, -1), end_ids=(5, 17, 40)),
        {**NOOP, "gate_block": 2},
    ),
    "thresholds": (THRESHOLD, {"family": "qwen3"}),
    "gold alone": (replace(DRAWN, max_new_tokens=0), {}),
    "gated writes": (GATED, {}),
    "gated writes, thresholds, noop, blocks, ends, more layers that always run": (
        replace(GATED, policy=None, tau=0.5, never_skip=(2, -1), end_ids=(5, 17, 40)),
        {**NOOP, "gate_block": 2},
    ),
    "gated writes, nothing asked for": (replace(GATED, max_new_tokens=0), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_episodes_are_those_of_an_engine(
    there: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    settings, options = CASES[name]
    served, parallel = there(engine_and_parallel, tmp_path / "model", settings, **options)
    assert len(parallel) == 15
    skipped = []
    for theirs, ours in zip(served, parallel, strict=True):
        assert replace(ours, segments=()) == replace(theirs, segments=())
        for one, other in zip(ours.segments, theirs.segments, strict=True):
            assert (one.kind, one.sampled_by) == (other.kind, other.sampled_by)
            assert (one.prompt_ids, one.token_ids) == (other.prompt_ids, other.token_ids)
            np.testing.assert_allclose(one.nll_gated_N, other.nll_gated_N, atol=1e-4)
            np.testing.assert_allclose(one.nll_dense_N, other.nll_dense_N, atol=1e-4)
            ours_T, theirs_T = one.trace, other.trace
            for part in ("skip_TL", "version_T", "protected_T", "closes_T", "chunks_T"):
                np.testing.assert_array_equal(getattr(ours_T, part), getattr(theirs_T, part), part)
            np.testing.assert_allclose(ours_T.prob_TL, theirs_T.prob_TL, atol=1e-5)
            same = ("prompt_tokens", "decode_start", "gates_on", "replayed_tokens")
            assert [getattr(ours_T, n) for n in same] == [getattr(theirs_T, n) for n in same]
            skipped.append(one.trace.skip_TL)
    assert 0.1 < np.concatenate(skipped).mean() < 0.8
    if settings.end_ids and settings.sampled_by is Sampler.GATED:
        ended = {len(episode.segments[0].token_ids) for episode in parallel}
        assert len(ended) > 1  # rows that end early lie beside rows that go on


# --- one pass over many rows ---------------------------------------------------------------------------


def texts(count: int) -> list[GivenText]:
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist())

    return [GivenText(ids(3 + 5 * i % 11), ids(1 + 3 * i % 7)) for i in range(count)]


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_cutting_rows_into_passes_changes_nothing(batch_tokens: int) -> None:
    model, rows = lively(), texts(9)
    gates = drawn_gates(model.config, POLICY, list(range(9)))
    found = pass_texts(model, rows, gates, batch_tokens)
    for row, text in enumerate(rows):
        alone = pass_texts(model, [text], drawn_gates(model.config, POLICY, [row]), 10_000)
        tokens = len(text.token_ids)
        assert torch.equal(found.skip_LRC[:, row, : tokens - 1], alone.skip_LRC[:, 0, : tokens - 1])
        torch.testing.assert_close(found.nll_RN[row, :tokens], alone.nll_RN[0])
        assert not found.skip_LRC[:, row, tokens - 1 :].any()
        assert not found.nll_RN[row, tokens:].any() and int(found.scored_RN[row].sum()) == tokens


def test_batches_hold_what_they_may() -> None:
    rows = texts(20)
    batches = cut_texts(rows, 45)
    lengths = [len(t.prompt_ids) + len(t.token_ids) - 1 for t in rows]
    assert sorted(row for batch in batches for row in batch) == list(range(20))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 45 for batch in batches)
    assert len(batches) < 12


def test_nll_is_the_cross_entropy_of_the_logits() -> None:
    draw = torch.Generator().manual_seed(0)
    state, head = torch.randn(7, 16, generator=draw), torch.randn(50, 16, generator=draw)
    target = torch.randint(0, 50, (7,), generator=draw)
    wanted = -(state.double() @ head.double().T).log_softmax(-1)[torch.arange(7), target]
    torch.testing.assert_close(token_nll(state, head, target).double(), wanted)


def test_a_shift_is_added_to_the_logits_before_the_policy() -> None:
    """Against gates whose own biases were moved; T and bounds act behind the shift."""
    import copy

    model, rows = lively(), texts(9)
    moved = copy.deepcopy(model)
    for layer in moved.model.fbs_layers():
        if layer.skip_gate is not None:
            layer.skip_gate.out.bias.data += 0.7
            layer.skip_gate.clip = 100.0  # the clip comes before a shift from outside
    inside = model.config.gate_logit_clip - 0.1
    free = pass_texts(model, rows, dense_gates(), 10_000).prob_LRC
    assert float(torch.logit(free[free > 0]).abs().max()) < inside
    seeds = list(range(9))
    shifted = pass_texts(model, rows, drawn_gates(model.config, POLICY, seeds, shift=0.7), 10_000)
    wanted = pass_texts(moved, rows, drawn_gates(model.config, POLICY, seeds), 10_000)
    plain = pass_texts(model, rows, drawn_gates(model.config, POLICY, seeds), 10_000)
    assert torch.equal(shifted.skip_LRC, wanted.skip_LRC)
    assert int(shifted.skip_LRC.sum()) > int(plain.skip_LRC.sum())


def test_fixed_gates_skip_at_their_rates_and_never_protected_layers() -> None:
    model, rows = lively(), texts(60)
    config = model.config
    rate_L = torch.full((config.layer_count,), 0.3)
    rate_L[4], rate_L[5] = 1.0, 0.0
    found = pass_texts(model, rows, fixed_gates(config, rate_L), 10_000)
    acted_RC = found.acted_RC
    skipped_L = (found.skip_LRC & acted_RC).sum((1, 2)) / acted_RC.sum()
    protected = list(config.protected_layers)
    assert protected and skipped_L[protected].sum() == 0
    free = [i for i in range(config.layer_count) if i not in (*protected, 4, 5)]
    assert skipped_L[4] == 1 and skipped_L[5] == 0
    torch.testing.assert_close(skipped_L[free].mean(), torch.tensor(0.3), atol=0.05, rtol=0)


def test_thresholds_decide_on_their_own_probabilities() -> None:
    model, rows = lively(), texts(9)
    found = pass_texts(model, rows, threshold_gates(0.5), 10_000)
    decided = (found.prob_LRC >= 0.5) & found.acted_RC
    assert torch.equal(found.skip_LRC, decided) and bool(decided.any())


# --- greedy continuations --------------------------------------------------------------------------------


def test_continuations_are_the_greedy_ones_and_end_at_an_end() -> None:
    model = lively()
    prompts = [text.prompt_ids for text in texts(6)]

    def greedy(prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        ids = list(prompt)
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), gates="dense").logits[0, -1].argmax()))
        return tuple(ids[len(prompt) :])

    wanted = [greedy(prompt, 9) for prompt in prompts]
    assert write_greedily(model, prompts, 9, ()) == wanted
    end = wanted[0][3]
    ended = write_greedily(model, prompts, 9, (end,))
    places = [row.index(end) + 1 if end in row else 9 for row in wanted]
    assert ended == [row[:place] for row, place in zip(wanted, places, strict=True)]
    assert min(places) <= 4


# --- what the gated policy writes ------------------------------------------------------------------------


def test_in_16_bits_decisions_are_those_of_the_writing() -> None:
    import copy

    model = copy.deepcopy(lively()).to(torch.bfloat16)
    tasks, settings = tiny_tasks(6, 8), replace(GATED, temperature=1.0)
    episodes = ParallelRollouts(model, 4000).roll(tasks, settings)
    samples = [(task.prompt_ids, seed) for task in tasks for seed in task.seeds]
    prompts, seeds = zip(*samples, strict=True)
    made = write_gated(model, prompts, seeds, settings, 4000)
    for row, (episode, text) in enumerate(zip(episodes, made.texts, strict=True)):
        own = episode.segments[0]
        assert (own.token_ids, len(own.token_ids)) == (text.token_ids, 24)
        np.testing.assert_array_equal(own.trace.skip_TL, made.skip_LRC[:, row].T)
    # The pass would have decided a few of them otherwise.
    own_seeds = [gate_seed(seed, SegmentKind.SELF) for seed in seeds]
    decided = pass_texts(model, made.texts, drawn_gates(model.config, POLICY, own_seeds), 4000)
    assert 0 < int((decided.skip_LRC != made.skip_LRC).sum()) < 0.01 * made.skip_LRC.numel()


# --- as food for the learner ------------------------------------------------------------------------------


def tiny_tasks(count: int = 3, samples: int = 4) -> list[RolloutTask]:
    rows = texts(2 * count)
    return [
        RolloutTask(f"q{i}", rows[i].prompt_ids, (*rows[i + count].token_ids, 3, 4), tuple(range(i, i + samples)))
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("writer", [Sampler.DENSE, Sampler.GATED])
def test_the_learner_finds_no_mismatch_and_trains_on_them(writer: Sampler) -> None:
    import copy

    model: FBSForCausalLM = copy.deepcopy(lively())
    tree = {"lr_gates": 1e-2, "minibatches": 2, "epochs": 1, "target_kl": None}
    learner = PPOLearner(model, from_tree(LearnerSettings, tree), 7)
    rollouts = ParallelRollouts(model, 100)
    plan = learner.plan(0)
    settings = RolloutSettings(
        writer, 8, float(writer is Sampler.GATED), policy=plan.policy, never_skip=plan.never_skip
    )
    episodes = rollouts.roll(tiny_tasks(), settings)
    exact = MismatchLimits(tokens=20, logp_max=1e-4, kl=1e-9, flip_frac=0.0)
    assert learner.self_test(episodes, exact).flip_rate == 0
    metrics = learner.update(episodes, 0)
    assert metrics["train/optimizer_steps"] == 2 and metrics["mismatch/flip_rate"] == 0
    again = rollouts.roll(tiny_tasks(), settings)
    if writer is Sampler.GATED:
        assert any(
            a.segments[0].token_ids != b.segments[0].token_ids
            for a, b in zip(episodes, again, strict=True)
        )
        return
    dense = [[s.nll_dense_N.tolist() for s in e.segments] for e in (*episodes, *again)]
    assert dense[: len(episodes)] == dense[len(episodes) :]
    moved = [
        not np.array_equal(a.segments[0].trace.prob_TL, b.segments[0].trace.prob_TL)
        for a, b in zip(episodes, again, strict=True)
    ]
    assert all(moved)


def test_dense_nlls_are_kept_until_they_are_forgotten() -> None:
    import copy

    model = copy.deepcopy(lively())
    rollouts = ParallelRollouts(model, 100)
    given = texts(4)
    before = rollouts.dense_nll(given)
    model.lm_head.weight.data *= 1.5
    assert all(np.array_equal(a, b) for a, b in zip(before, rollouts.dense_nll(given), strict=True))
    rollouts.forget_dense()
    assert not np.array_equal(before[0], rollouts.dense_nll(given)[0])


# --- refusals -------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused() -> None:
    rollouts, tasks = ParallelRollouts(lively(), 100), tiny_tasks()
    with pytest.raises(
        ValueError, match=r"temperature is 0\.7; .* the dense model writes greedily"
    ):
        rollouts.roll(tasks, RolloutSettings(Sampler.DENSE, 8, 0.7))
    for writer in (Sampler.DENSE, Sampler.GATED):
        with pytest.raises(ValueError, match="context is 128; leave the question out"):
            rollouts.roll(tasks, RolloutSettings(writer, 126))
    alien = RolloutTask("alien", (3, VOCAB), (1, 2), (0,))
    with pytest.raises(ValueError, match=f"question alien has a token beyond .* of {VOCAB}"):
        rollouts.roll([alien], DRAWN)
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        ParallelRollouts(lively(), 0)
    assert rollouts.roll([], DRAWN) == []


def test_segments_are_what_the_parallel_pass_of_one_row_says(tmp_path: Path) -> None:
    model = make_folder(tmp_path / "model")
    for settings in (DRAWN, THRESHOLD, replace(GATED, temperature=0.8)):
        episodes = ParallelRollouts(model, 300).roll(make_tasks(4), settings)
        assert [line for e in episodes for line in differences(model, e, settings)] == []
        assert {s.kind for e in episodes for s in e.segments} == set(SegmentKind)
