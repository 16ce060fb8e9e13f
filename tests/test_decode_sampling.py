"""Draws of the graph decoder: the right set, the right frequencies, a function of seed and position."""

from __future__ import annotations

import copy

import pytest
import torch

from fbs_rl.decode.graph_decoder import GraphDecoder
from fbs_rl.decode.sampling import top_p_sampler
from fbs_rl.decode.step_program import kernel_shape
from tests.decode_launchers import PLACES, make_launcher
from tests.tiny import lively

PROB = torch.tensor([0.05, 0.4, 0.3, 0.05, 0.2])


def test_draws_come_from_the_smallest_set_that_reaches_top_p() -> None:
    """0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.2: tokens 1, 2 and 4, in the proportions 4 : 3 : 2."""
    count = 20000
    sample = top_p_sampler(1.0, 0.75, torch.full((count,), 11))
    drawn = sample(PROB.log().expand(count, -1), torch.arange(count))
    share = drawn.bincount(minlength=5) / count
    torch.testing.assert_close(share, torch.tensor([0, 4, 3, 0, 2]) / 9, atol=0.012, rtol=0)


def test_temperature_flattens() -> None:
    """At T = 2 probabilities go by their square roots."""
    count = 20000
    sample = top_p_sampler(2.0, 1.0, torch.full((count,), 3))
    share = sample(PROB.log().expand(count, -1), torch.arange(count)).bincount(minlength=5) / count
    torch.testing.assert_close(share, PROB.sqrt() / PROB.sqrt().sum(), atol=0.012, rtol=0)


def test_a_draw_depends_on_its_own_seed_and_position_alone() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    seeds, position = torch.tensor([5, 6, 7, 8]), torch.tensor([3, 9, 27, 81])
    together = top_p_sampler(1.5, 0.95, seeds)(logits, position)
    rows = zip(seeds.split(1), logits.split(1), position.split(1), strict=True)
    alone = [top_p_sampler(1.5, 0.95, seed)(row, place) for seed, row, place in rows]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("place", PLACES)
def test_the_decoder_feeds_what_was_drawn(place: str) -> None:
    model = lively("qwen3", paw=False, chunk=False, gate=False)
    launcher = make_launcher(place, kernel_shape(model, 1))
    placed = copy.deepcopy(model).to(launcher.device)
    sample = top_p_sampler(1.0, 0.9, torch.tensor([4], device=launcher.device))
    decoder = GraphDecoder(placed, 1, 44, sampler=sample, launcher=launcher)
    prompt = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    decoder.prefill(prompt)
    decoder.step(3)
    made = decoder.trace().token_BT
    with torch.no_grad():
        logits = model(torch.cat((prompt, made[:, :3]), 1), gates="dense").logits[:, 39:]
    wanted = [
        int(top_p_sampler(1.0, 0.9, torch.tensor([4]))(logits[:, t], torch.tensor([40 + t])))
        for t in range(4)
    ]
    assert made[0].tolist() == wanted


def test_impossible_settings_are_refused() -> None:
    for temperature, top_p in ((0.0, 0.9), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ValueError, match="temperature above 0"):
            top_p_sampler(temperature, top_p, torch.tensor([1]))
