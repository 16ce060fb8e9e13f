"""Text that the gated policy writes: drawn from its softmax, a function of its own seed, replayed as executed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.gated_continuations import write_gated
from fbs_rl.rl.parallel_pass import drawn_gates, pass_texts, replayed_gates, threshold_gates
from fbs_rl.rl.reward import Sampler, SegmentKind
from fbs_rl.rl.rollout import RolloutSettings, gate_seed
from tests.tiny import NOOP, VOCAB, lively

POLICY = GatePolicy(temperature=1.3, low=0.1, high=0.9)
WRITES = RolloutSettings(Sampler.GATED, 10, 1.0, POLICY)
SAMPLES = 4000


def prompts(count: int) -> list[tuple[int, ...]]:
    """Of 2 to 12 tokens."""
    draw = torch.Generator().manual_seed(3)
    lengths = [2 + 5 * i % 11 for i in range(count)]
    return [tuple(torch.randint(0, VOCAB, (n,), generator=draw).tolist()) for n in lengths]


def excess(tokens: list[int], prob_V: torch.Tensor) -> float:
    """χ² of counts against probabilities, in standard deviations above its mean; rare tokens are one class."""
    seen_V = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    wanted_V = prob_V.double() * len(tokens)
    rare_V = wanted_V < 8
    seen = torch.cat((seen_V[~rare_V], seen_V[rare_V].sum().view(1)))
    wanted = torch.cat((wanted_V[~rare_V], wanted_V[rare_V].sum().view(1)))
    classes = int((wanted > 0).sum()) - 1
    assert classes > 20
    chi = ((seen - wanted) ** 2 / wanted.clamp_min(1e-9)).sum()
    return float((chi - classes) / (2 * classes) ** 0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    """First tokens: of the dense prompt. Second ones: of the pass in which the first one skips every free layer."""
    model, (prompt,) = lively(), prompts(1)
    settings = replace(WRITES, max_new_tokens=2, temperature=temperature, policy=None, tau=0.0)
    made = write_gated(model, [prompt] * SAMPLES, range(SAMPLES), settings, 3000)
    first, second = zip(*(text.token_ids for text in made.texts), strict=True)
    with torch.no_grad():
        rows = torch.tensor([[*prompt, token] for token in range(VOCAB)])
        gated = model(rows, gates="threshold", tau=0.0, decode_start=len(prompt))
        dense = model(rows, gates="dense")
    assert int(gated.skip[:, 0, -1].sum()) > 3
    dense_VTV, gated_VTV = ((out.logits / temperature).softmax(-1) for out in (dense, gated))
    share_V = torch.bincount(torch.tensor(first), minlength=VOCAB) / SAMPLES
    first_V = dense_VTV[0, len(prompt) - 1]
    assert excess(list(first), first_V) < 3
    assert excess(list(second), share_V @ gated_VTV[:, -1]) < 3
    # Near misses are seen: half as sharp again, and what the dense model would say.
    sharper_V = first_V.pow(1.5) / first_V.pow(1.5).sum()
    assert excess(list(first), sharper_V) > 10
    assert excess(list(second), share_V @ dense_VTV[:, -1]) > 10


@pytest.mark.parametrize("options", [{}, NOOP])
def test_what_is_written_does_not_depend_on_the_batch(options: dict[str, str]) -> None:
    model, asked = lively(**options), prompts(7)
    for settings in (WRITES, replace(WRITES, policy=None, tau=0.5, end_ids=(4, 9, 16, 25, 36))):
        together = write_gated(model, asked, range(7), settings, 10_000)
        pairs = write_gated(model, asked, range(7), settings, 45)
        assert pairs.texts == together.texts
        assert torch.equal(pairs.skip_LRC, together.skip_LRC)
        alone = write_gated(model, asked[3:4], [3], settings, 1)
        assert alone.texts == together.texts[3:4]
        assert torch.equal(alone.skip_LRC[:, 0], together.skip_LRC[:, 3])
        other = write_gated(model, asked[3:4], [4], settings, 1)
        assert other.texts != alone.texts
    lengths = {len(text.token_ids) for text in together.texts}
    assert len(lengths) > 1 and together.texts[0].token_ids != together.texts[1].token_ids


@pytest.mark.parametrize("options", [{}, {**NOOP, "gate_block": 2}])
@pytest.mark.parametrize("policy", [POLICY, None])
def test_the_parallel_pass_decides_what_was_executed(
    options: dict[str, str], policy: GatePolicy | None
) -> None:
    model, asked = lively(**options), prompts(9)
    settings = replace(WRITES, policy=policy, tau=0.5, never_skip=(3,), end_ids=(4, 9))
    made = write_gated(model, asked, range(9), settings, 60)
    seeds = [gate_seed(seed, SegmentKind.SELF) for seed in range(9)]
    gates = (
        threshold_gates(0.5, (3,))
        if policy is None
        else drawn_gates(model.config, policy, seeds, (3,))
    )
    decided = pass_texts(model, made.texts, gates, 100)
    replayed = pass_texts(model, made.texts, replayed_gates(made.skip_LRC, (3,)), 100)
    columns = decided.skip_LRC.shape[2]
    assert torch.equal(made.skip_LRC[:, :, :columns], decided.skip_LRC)
    assert not made.skip_LRC[:, :, columns:].any() and not made.skip_LRC[3].any()
    assert 0.1 < float(made.skip_LRC[:, decided.acted_RC].float().mean()) < 0.8
    for name in ("skip_LRC", "prob_LRC", "nll_RN", "opens_RC", "chunks_RC"):
        torch.testing.assert_close(getattr(replayed, name), getattr(decided, name))


def test_actions_that_the_gates_would_not_take_are_replayed_all_the_same() -> None:
    """As between two precisions: the pass reports its own p for what was executed."""
    model, asked = lively(), prompts(4)
    made = write_gated(model, asked, range(4), WRITES, 1000)
    free = [i for i in range(model.config.layer_count) if i not in model.config.protected_layers]
    other_LRC = made.skip_LRC.clone()
    other_LRC[free[1], 2, 4] ^= True
    found = pass_texts(model, made.texts, replayed_gates(other_LRC), 1000)
    same = pass_texts(model, made.texts, replayed_gates(made.skip_LRC), 1000)
    assert torch.equal(found.skip_LRC, other_LRC)
    moved_RN = (found.nll_RN != same.nll_RN).nonzero()
    assert {row for row, _ in moved_RN.tolist()} == {2} and int(moved_RN[:, 1].min()) == 5
