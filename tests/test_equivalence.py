"""The pass with a cache, one token at a time, equals the parallel pass; dense equals the backbone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbs_rl.model import FBSCache, FBSConfig, FBSForCausalLM
from fbs_rl.types import FBSOutput
from tests.tiny import (
    LAYERS,
    NOOP,
    assert_same,
    backbone,
    fresh,
    left_padded,
    lively,
    stepwise,
)

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True, database=None)
MARGIN = 1e-5

models = st.builds(
    lambda family, kv, path, extra: lively(family=family, kv_on_skip=kv, skip_path=path, **extra),
    st.sampled_from(["llama", "qwen3"]),
    st.sampled_from(["project", "noop"]),
    st.sampled_from(["identity", "adapter"]),
    st.sampled_from(
        [{}, {"gate_block": 2}, {"gate_ahead": 1}, {"segment_position": True}, {"chunk_cache": 2}]
    ),
)


@st.composite
def calls(draw: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(ids, left-padding mask, gate arguments) of a batch of one to four rows."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    ids, mask = left_padded(draw(st.integers(0, 10**6)), lengths)
    row_of = st.lists(st.integers(0, 10), min_size=len(lengths), max_size=len(lengths))
    gates: dict[str, Any] = {"decode_start": torch.tensor(draw(row_of))}
    if draw(st.booleans()):
        gates |= {"gates": "threshold", "tau": draw(st.sampled_from([0.3, 0.5, 0.62]))}
    else:
        seeds = [seed * 2**33 - 7 for seed in draw(row_of)]
        gates |= {"gates": "sample", "gate_seed": torch.tensor(seeds)}
    return ids, mask, gates


@torch.no_grad()
def parallel(model: Any, ids: Tensor, mask: Tensor, gates: dict[str, Any]) -> FBSOutput:
    """The parallel pass; the example is dropped where a rounding error could turn a decision."""
    found = model(ids, mask, **gates)
    valid = mask.bool()
    if gates.get("gates") == "threshold":
        assume(bool(((found.gate_prob[:, valid] - gates["tau"]).abs() > MARGIN).all()))
    best = found.boundary_logits[valid].topk(2).values
    assume(bool((best[:, 0] - best[:, 1] > MARGIN).all()))
    return found


# --- parallel = incremental ---------------------------------------------------------------------------


@PROPERTY
@given(models, calls())
def test_one_token_at_a_time_equals_the_parallel_pass(model: Any, call: Any) -> None:
    ids, mask, gates = call
    assert_same(stepwise(model, ids, mask, **gates), parallel(model, ids, mask, gates), mask)


@PROPERTY
@given(models, calls(), st.integers(1, 14))
def test_a_prompt_then_steps_equals_the_parallel_pass(model: Any, call: Any, prompt: int) -> None:
    """The prompt's call may reach beyond decode_start: its columns from there on run as steps."""
    ids, mask, gates = call
    found = stepwise(model, ids, mask, prompt=min(prompt, ids.shape[1]), **gates)
    assert_same(found, parallel(model, ids, mask, gates), mask)


@pytest.mark.parametrize("prompt", [6, 14])
@pytest.mark.parametrize("kv", ["project", "noop"])
def test_a_prompt_call_may_reach_into_decoding(kv: str, prompt: int) -> None:
    """Rows begin to decode at different columns, all inside the first call."""
    model = lively(kv_on_skip=kv)
    ids, mask = left_padded(12, [14, 14, 11])
    gates: dict[str, Any] = {"gates": "threshold", "tau": 0.5}
    gates["decode_start"] = torch.tensor([2, 9, 4])
    with torch.no_grad():
        wanted = model(ids, mask, **gates)
    assert wanted.skip[:, 0, 2:9].any()
    assert_same(stepwise(model, ids, mask, prompt=prompt, **gates), wanted, mask)


@PROPERTY
@given(models, calls(), st.randoms())
def test_rows_may_come_in_any_order(model: Any, call: Any, shuffle: Any) -> None:
    ids, mask, gates = call
    order = list(range(len(ids)))
    shuffle.shuffle(order)
    moved = {k: v[order] if isinstance(v, Tensor) else v for k, v in gates.items()}
    wanted = parallel(model, ids, mask, gates)
    for found in (
        parallel(model, ids[order], mask[order], moved),
        stepwise(model, ids[order], mask[order], **moved),
    ):
        inverse = torch.tensor(order).argsort()
        found.logits, found.boundary_logits = found.logits[inverse], found.boundary_logits[inverse]
        for name in ("skip", "gate_prob", "lookahead"):
            setattr(found, name, getattr(found, name)[:, inverse])
        assert_same(found, wanted, mask)


@PROPERTY
@given(models, calls())
def test_replayed_actions_give_the_same_pass(model: Any, call: Any) -> None:
    """Also the same probabilities to the last bit: the ratio of an update's first forward is 1."""
    ids, mask, gates = call
    wanted = parallel(model, ids, mask, gates)
    again = {"gates": "replay", "skip": wanted.skip, "decode_start": gates["decode_start"]}
    with torch.no_grad():
        replayed = model(ids, mask, **again)
    for name in ("logits", "skip", "gate_prob", "lookahead", "boundary_logits"):
        assert torch.equal(getattr(replayed, name), getattr(wanted, name)), name
    cached = stepwise(model, ids, mask, **again)
    cached.gate_prob = wanted.gate_prob  # a replayed step computes no gate
    assert_same(cached, wanted, mask)


@pytest.mark.parametrize("gates", ["dense", "threshold", "sample"])
@pytest.mark.parametrize("options", [{}, {"paw_inclusion": "hard", **NOOP}], ids=["soft", "hard"])
def test_gradients_change_no_value(options: dict[str, Any], gates: str) -> None:
    """A training forward equals the forward that recorded the actions, to the last bit."""
    model = lively(**options)
    ids, mask = left_padded(11, [16, 9])
    call: dict[str, Any] = {"gates": gates, "tau": 0.5, "gate_seed": 3}
    training = model(ids, mask, **call)
    with torch.no_grad():
        recorded = model(ids, mask, **call)
    assert training.logits.requires_grad and not recorded.logits.requires_grad
    for name in ("logits", "skip", "gate_prob", "lookahead", "boundary_logits"):
        assert torch.equal(getattr(training, name), getattr(recorded, name)), name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_steps_equal_the_dense_pass(family: str) -> None:
    model = lively(family)
    ids, mask = left_padded(1, [18, 11, 3])
    with torch.no_grad():
        wanted = model(ids, mask, gates="dense")
    found = stepwise(model, ids, mask, prompt=7, gates="dense")
    found.gate_prob = wanted.gate_prob  # a dense step computes no gate
    assert_same(found, wanted, mask)


@pytest.mark.parametrize("kv", ["project", "noop"])
def test_columns_without_a_token_change_nothing(kv: str) -> None:
    """A batch padded wider than its longest row, and rows that end before the others."""
    model = lively(kv_on_skip=kv)
    ids, mask = left_padded(2, [12, 9, 10])
    mask[:, :2] = 0
    mask[1, -1] = 0
    gates: dict[str, Any] = {"gates": "threshold", "tau": 0.5, "decode_start": 0}
    with torch.no_grad():
        wanted = model(ids, mask, **gates)
        narrow = model(ids[:, 2:], mask[:, 2:], **gates)
    assert torch.equal(wanted.skip[:, :, 2:], narrow.skip)
    torch.testing.assert_close(wanted.logits[:, 2:], narrow.logits, atol=1e-5, rtol=1e-5)
    assert_same(stepwise(model, ids, mask, **gates), wanted, mask)


@pytest.mark.parametrize("kv", ["project", "noop"])
def test_padding_between_tokens_equals_the_parallel_pass(kv: str) -> None:
    model = lively(kv_on_skip=kv)
    ids, mask = left_padded(2, [12, 9, 10])
    mask[:, 5:7] = 0
    gates: dict[str, Any] = {"gates": "threshold", "tau": 0.5, "decode_start": 0}
    with torch.no_grad():
        wanted = model(ids, mask, **gates)
    assert_same(stepwise(model, ids, mask, **gates), wanted, mask)


@pytest.mark.parametrize("decode_start", [0, 2, 100])
def test_right_padded_prompts_go_on_where_their_text_ended(decode_start: int) -> None:
    model = lively()
    ids, mask = left_padded(3, [12, 12, 12])
    mask[0, 4:7] = 0
    mask[2, 6] = 0
    gates: dict[str, Any] = {"gates": "threshold", "tau": 0.5, "decode_start": decode_start}
    with torch.no_grad():
        wanted = model(ids, mask, **gates)
    assert_same(stepwise(model, ids, mask, prompt=7, **gates), wanted, mask)


@pytest.mark.parametrize("options", [{}, NOOP], ids=["default", "paper"])
def test_cache_grows_past_its_first_buffers(options: dict[str, Any]) -> None:
    model = copy.deepcopy(lively(**options))
    model.config.max_position_embeddings = 512
    ids, mask = left_padded(4, [266, 258])
    gates: dict[str, Any] = {"gates": "threshold", "tau": 0.5, "decode_start": 250}
    with torch.no_grad():
        wanted = model(ids, mask, **gates)
    assert_same(stepwise(model, ids, mask, prompt=250, **gates), wanted, mask, tolerance=5e-5)


def test_prompt_does_not_skip_when_a_cache_is_given() -> None:
    model = lively()
    ids, mask = left_padded(5, [12, 7])
    cache = FBSCache(LAYERS)
    with torch.no_grad():
        prompt = model(ids[:, :9], mask[:, :9], past_key_values=cache, gates="threshold", tau=0.0)
        after = model(ids[:, 9:], mask, past_key_values=cache, gates="threshold", tau=0.0)
    free = [i for i in range(LAYERS) if i not in model.config.protected_layers]
    assert not prompt.skip.any() and after.skip[free].all()


# --- caches full of NaN -------------------------------------------------------------------------------


@PROPERTY
@given(models, calls(), st.integers(0, 6))
def test_nothing_is_read_that_was_not_written(model: Any, call: Any, prompt: int) -> None:
    ids, mask, gates = call
    prompt = min(prompt, ids.shape[1])
    poisoned = stepwise(model, ids, mask, prompt=prompt, poison=True, **gates)
    clean = stepwise(model, ids, mask, prompt=prompt, poison=False, **gates)
    for name in ("logits", "skip", "gate_prob", "lookahead", "boundary_logits"):
        one, other = getattr(poisoned, name), getattr(clean, name)
        assert torch.isfinite(one).all() and torch.equal(one, other), name


@pytest.mark.parametrize("options", [{}, NOOP], ids=["project", "noop"])
def test_cache_counts_the_entries_that_exist(options: dict[str, Any]) -> None:
    model = lively(**options)
    ids, mask = left_padded(6, [12, 9])
    found = stepwise(model, ids, mask, gates="threshold", tau=0.5, decode_start=2)
    tokens = LAYERS * int(mask.sum())
    skipped = int(found.skip[:, mask.bool()].sum())
    assert skipped > 0
    entries = tokens - (skipped if options else 0)
    groups, width = model.config.num_key_value_heads, model.config.head_dim
    assert found.past_key_values.bytes() == entries * 2 * groups * width * 4


# --- dense = backbone, to the bit ----------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_is_the_backbone_to_the_bit(
    family: str, dtype: torch.dtype, attention: str, padded: bool
) -> None:
    base: Any = copy.deepcopy(backbone(family, False, attention)).to(dtype)
    options = FBSConfig(paw_layers="every:4")  # two layers that look ahead
    model: Any = FBSForCausalLM.from_backbone(copy.deepcopy(base), options)
    ids, mask = left_padded(7, [21, 13, 5] if padded else [21, 21, 21])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = base(ids, mask, position_ids=positions).logits
        found = model(ids, mask, position_ids=positions, gates="dense").logits
        inferred = model(ids, mask, gates="dense").logits
    valid = mask.bool()
    assert found.dtype == dtype
    assert torch.equal(found[valid], wanted[valid]) and torch.equal(inferred[valid], wanted[valid])


def test_lively_modules_change_the_backbone() -> None:
    ids, mask = left_padded(7, [21, 13])
    with torch.no_grad():
        wanted = backbone()(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        found = lively()(ids, mask, gates="dense").logits
    assert (found - wanted)[mask.bool()].abs().max() > 0.1


# --- the ends of the threshold ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NOOP], ids=["default", "paper"])
def test_threshold_of_one_never_skips(options: dict[str, Any]) -> None:
    model = fresh(**options)
    ids = left_padded(8, [17, 17])[0]
    with torch.no_grad():
        dense, found = model(ids, gates="dense"), model(ids, gates="threshold", tau=1.0)
        assert torch.equal(dense.logits, backbone()(ids).logits)
    assert not found.skip.any()
    assert torch.equal(found.logits, dense.logits)


@pytest.mark.parametrize("kv", ["project", "noop"])
def test_threshold_of_zero_skips_every_free_layer(kv: str) -> None:
    model = lively(chunk=False, kv_on_skip=kv, skip_path="identity")
    ids, mask = left_padded(9, [17, 12])
    with torch.no_grad():
        found = model(ids, mask, gates="threshold", tau=0.0)
        wanted = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    assert found.skip[:, mask.bool()].all()
    assert torch.equal(found.logits[mask.bool()], wanted[mask.bool()])
    steps = stepwise(model, ids, mask, gates="threshold", tau=0.0, decode_start=0)
    assert_same(steps, found, mask)


def test_a_threshold_per_row_is_applied_to_its_row() -> None:
    model = lively()
    ids = left_padded(10, [15, 15, 15])[0]
    taus = torch.tensor([0.0, 0.5, 1.0])
    with torch.no_grad():
        together = model(ids, gates="threshold", tau=taus)
        for row, tau in enumerate(taus.tolist()):
            alone = model(ids[row : row + 1], gates="threshold", tau=tau)
            assert torch.equal(together.skip[:, row], alone.skip[:, 0])
    rates = together.skip.float().mean((0, 2))
    assert rates[0] > rates[1] > rates[2] == 0
