"""The parallel pass against the brute-force reference, option by option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fbs_rl.types import FBSOutput
from tests.reference import Gates, Reading, read
from tests.reference_math import weights_of
from tests.tiny import LAYERS, NOOP, VOCAB, lively

LENGTH = 20
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"family": "qwen3", **NOOP},
    "mean, full space": {
        "paw_compression": "mean",
        "paw_embed_space": "full",
        "kv_on_skip": "noop",
    },
    "conv, full space": {"family": "qwen3", "paw_embed_space": "full"},
    "linear, fixed window": {
        "paw_compression": "linear",
        "paw_window": "fixed",
        "gate_inputs": "residual",
    },
    "none, hard window": {
        "paw_compression": "none",
        "paw_inclusion": "hard",
        "gate_inputs": "preview",
        "skip_path": "identity",
    },
    "blocks of two": {"gate_block": 2, "kv_on_skip": "noop"},
    "ahead": {"gate_ahead": 1},
    "ahead, no entries": {"gate_ahead": 1, "paw_layers": "all", "family": "qwen3", **NOOP},
    "blocks of two, ahead": {"gate_block": 2, "gate_ahead": 1, "never_skip": (5,)},
    "blocks of three": {"gate_block": 3, "never_skip": (0, -1), "family": "qwen3"},
    "no preview": {"paw": False, "gate_inputs": "residual", "tied": True, **NOOP},
    "no chunks": {"chunk": False, "tied": True},
    "segments": {"segment_position": True, "segment_max_tokens": 4, "family": "qwen3"},
    "ring of two chunks": {"chunk_layers": (3, 5, -1), "chunk_cache": 2, "tied": True},
    "far distances": {"chunk_distance_buckets": 8, "chunk_cache": 9, "chunk_boundary_layer": 0},
    "every layer": {"paw_layers": "all", "bias": True, "chunk_layers": (3, 4, 5, 6, 7)},
    "late preview": {"paw_layers": (1, 2, -2), "never_skip": (0,), "family": "qwen3", **NOOP},
    "no gate": {"gate": False},
}


def tokens(seed: int, rows: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def compare(found: FBSOutput, row: int, wanted: Reading, tolerance: float = 1e-5) -> None:
    """Equal decisions, and every number of the row within `tolerance` of the reference."""
    pairs = {
        "logits": (found.logits[row], np.array(wanted.logits)),
        "gate_prob": (found.gate_prob[:, row].T, np.array(wanted.prob)),
    }
    if found.lookahead is not None:
        pairs["lookahead"] = (found.lookahead[:, row].T, np.array(wanted.lookahead))
    if found.boundary_logits is not None:
        pairs["boundary_logits"] = (found.boundary_logits[row], np.array(wanted.boundary))
        opens = [min(chunk) for chunk in wanted.chunks]
        assert found.taps.chunks.opens_BT[row].nonzero()[:, 0].tolist() == opens
    assert found.skip[:, row].T.tolist() == wanted.skip
    for name, (one, other) in pairs.items():
        np.testing.assert_allclose(
            one.double().numpy(), other, atol=tolerance, rtol=tolerance, err_msg=name
        )


def run_both(
    model: Any, ids: Tensor, starts: list[int], never_skip: tuple[int, ...] = (), **call: Any
) -> FBSOutput:
    """The parallel pass, each of whose rows has been compared with the reference."""
    with torch.no_grad():
        found = model(ids, decode_start=torch.tensor(starts), never_skip=never_skip, **call)
    weights = weights_of(model)
    for row, start in enumerate(starts):
        gates = Gates(
            mode=call["gates"],
            tau=call.get("tau", 0.0),
            seed=call.get("gate_seed", 0),
            start=start,
            never_skip=never_skip,
            temperature=call.get("window_temperature"),
            actions=call["skip"][:, row].tolist() if "skip" in call else None,
        )
        compare(found, row, read(weights, model.config, ids[row].tolist(), gates))
    return found


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "no gate"])
def test_threshold_pass_equals_the_reference(name: str) -> None:
    model = lively(**OPTIONS[name])
    found = run_both(model, tokens(3), [0, 4], gates="threshold", tau=0.5)
    free = [i for i in range(LAYERS) if i not in model.config.protected_layers]
    gated_skip = found.skip[free][:, found.taps.gated_BT]
    assert 0.2 < gated_skip.float().mean() < 0.6


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "no gate"])
def test_sampled_pass_equals_the_reference(name: str) -> None:
    found = run_both(
        lively(**OPTIONS[name]), tokens(4, rows=1), [2], gates="sample", gate_seed=2**40 + 17
    )
    assert found.skip[:, found.taps.gated_BT].any() and not found.skip[:, :, :2].any()


@pytest.mark.parametrize("name", ["default", "paper", "no gate"])
def test_dense_pass_equals_the_reference(name: str) -> None:
    found = run_both(lively(**OPTIONS[name]), tokens(5), [0, 0], gates="dense")
    assert not found.skip.any()


@pytest.mark.parametrize("name", ["default", "paper", "no chunks", "blocks of two"])
def test_replayed_pass_equals_the_reference(name: str) -> None:
    model = lively(**OPTIONS[name])
    starts = [0, 6]
    skip = torch.rand(LAYERS, 2, LENGTH, generator=torch.Generator().manual_seed(8)) < 0.5
    skip[sorted(model.config.protected_layers)] = False
    skip[:, 1, : starts[1]] = False
    found = run_both(model, tokens(6), starts, gates="replay", skip=skip)
    assert torch.equal(found.skip, skip)


def test_call_arguments_reach_the_reference_values() -> None:
    found = run_both(
        lively(), tokens(7), [0, 3], (1, -2), gates="threshold", tau=0.4, window_temperature=1.0
    )
    assert not found.skip[[1, LAYERS - 2]].any() and found.skip.any()


def test_the_tiny_models_exercise_what_they_are_for() -> None:
    """They meet every boundary class, chunks of many lengths and more chunks than the ring holds."""
    model = lively()
    with torch.no_grad():
        found = model(tokens(3, rows=8), gates="threshold", tau=0.5)
    labels = found.boundary_logits.argmax(-1)
    assert (torch.bincount(labels.flatten(), minlength=4) >= 8).all()
    sizes = torch.stack(
        [torch.bincount(row, minlength=LENGTH) for row in found.taps.chunks.chunk_id_BT]
    )
    assert {1, 2, 3} <= set(sizes.unique().tolist())
    assert ((sizes > 0).sum(1) > model.config.chunk_cache + 1).all()
    assert found.lookahead.min() < 1.5 and found.lookahead.max() > 4


# --- power: a reference that is wrong in one place must be told apart ------------------------------


@pytest.mark.parametrize("noop_keys", ["stale", "kept"])
def test_noop_is_told_apart_from_leaving_an_entry(noop_keys: str) -> None:
    model = lively(**OPTIONS["paper"])
    ids = tokens(3, rows=1)
    with torch.no_grad():
        found = model(ids, gates="threshold", tau=0.5)
    wrong = read(
        weights_of(model),
        model.config,
        ids[0].tolist(),
        Gates("threshold", tau=0.5, noop_keys=noop_keys),
    )
    assert np.abs(np.array(wrong.logits) - found.logits[0].numpy()).max() > 0.05


@pytest.mark.parametrize(
    "wrong",
    [{"visible_after": 0}, {"start": 1}, {"tau": 0.45}, {"temperature": 0.3}],
    ids=["chunks seen a token early", "start", "tau", "temperature"],
)
def test_a_slightly_wrong_reference_is_told_apart(wrong: dict[str, Any]) -> None:
    model, ids = lively(), tokens(3, rows=1)
    with torch.no_grad():
        found = model(ids, gates="threshold", tau=0.5)
    gates = Gates(**{"mode": "threshold", "tau": 0.5, **wrong})
    with pytest.raises(AssertionError):
        compare(found, 0, read(weights_of(model), model.config, ids[0].tolist(), gates))
