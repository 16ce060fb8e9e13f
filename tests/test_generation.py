"""transformers' generate() on an FBS model: with and without the cache, its options, its refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fbs_rl.model import FBSCache
from tests.tiny import CONTEXT, LAYERS, NOOP, VOCAB, left_padded, lively

NEW = 10
OPTIONS: list[dict[str, Any]] = [
    {},
    {"family": "qwen3", **NOOP},
    {"gate_block": 2, "kv_on_skip": "noop", "segment_position": True},
    {"gate_ahead": 1},
]
THRESHOLD: dict[str, Any] = {"gates": "threshold", "tau": 0.5}
GATES: list[dict[str, Any]] = [
    THRESHOLD,
    {"gates": "threshold", "tau": torch.tensor([0.4, 0.5, 0.6])},
    {"gates": "sample", "gate_seed": torch.tensor([7, 8, 9])},
    {"gates": "dense"},
]
IDS, MASK = left_padded(31, [9, 4, 7])
each_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=["default", "paper", "blocks", "ahead"]
)
each_gate = pytest.mark.parametrize("gates", GATES, ids=["threshold", "taus", "sample", "dense"])


def generate(model: Any, **call: Any) -> Tensor:
    wanted = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(IDS, attention_mask=MASK, **{**wanted, **call})


@torch.no_grad()
def argmax_loop(model: Any, ids: Tensor, mask: Tensor, steps: int, **gates: Any) -> Tensor:
    """Greedy text by whole parallel passes, where the prompt never skips."""
    start = mask.sum(1)
    for _ in range(steps):
        best = model(ids, mask, decode_start=start, **gates).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, best), dim=1)
        mask = torch.cat((mask, torch.ones_like(best)), dim=1)
    return ids


@each_option
@each_gate
def test_greedy_text_is_that_of_the_parallel_pass(
    options: dict[str, Any], gates: dict[str, Any]
) -> None:
    model = lively(**options)
    wanted = argmax_loop(model, IDS, MASK, NEW, **gates)
    assert torch.equal(generate(model, **gates), wanted)
    assert torch.equal(generate(model, use_cache=False, **gates), wanted)


def test_gates_change_the_text() -> None:
    model = lively()
    texts = {tuple(generate(model, **gates)[:, 9:].flatten().tolist()) for gates in GATES}
    assert len(texts) == len(GATES)


@each_option
def test_a_row_alone_gives_the_same_text(options: dict[str, Any]) -> None:
    model = lively(**options)
    together = generate(model, **THRESHOLD)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = model.generate(
            IDS[row : row + 1, -length:], max_new_tokens=NEW, do_sample=False, **THRESHOLD
        )
        assert torch.equal(alone[0], together[row, -length - NEW :])


def test_padding_is_inferred_from_the_pad_token() -> None:
    model = lively()
    ids = torch.where(MASK == 1, IDS.clamp_min(1), 0)
    call = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **THRESHOLD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "pad_token_id", 0)
        inferred = model.generate(ids, **call)
    assert torch.equal(inferred, model.generate(ids, attention_mask=MASK, **call))


@each_option
@pytest.mark.parametrize("gates", GATES[:3], ids=["threshold", "taus", "sample"])
def test_beam_search_with_the_cache_equals_without(
    options: dict[str, Any], gates: dict[str, Any]
) -> None:
    model = lively(**options)
    with_cache = generate(model, num_beams=3, **gates)
    assert torch.equal(with_cache, generate(model, num_beams=3, use_cache=False, **gates))
    assert not torch.equal(with_cache, generate(model, **gates))


def test_sampled_tokens_repeat_with_the_seed_of_torch() -> None:
    model, texts = lively(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, do_sample=True, temperature=1.5, **THRESHOLD))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_sampled_gates_repeat_with_their_own_seed() -> None:
    model = lively()
    one, again, other = (
        generate(model, gates="sample", gate_seed=seed) for seed in (2**40, 2**40, 5)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


@each_option
@pytest.mark.parametrize("size", [1, 4, 9])
def test_prompts_may_be_read_in_pieces(options: dict[str, Any], size: int) -> None:
    model = lively(**options)
    found = generate(model, prefill_chunk_size=size, **THRESHOLD)
    assert torch.equal(found, generate(model, **THRESHOLD))


def test_generation_may_go_on_from_a_cache() -> None:
    model = lively()
    cache = FBSCache(LAYERS, poison=True)
    first = model.generate(
        IDS[:1],
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        decode_start=9,
        **THRESHOLD,
    )
    assert cache.get_seq_length() == first.shape[1] - 1
    more = model.generate(
        first, past_key_values=cache, max_new_tokens=6, do_sample=False, decode_start=9, **THRESHOLD
    )
    assert torch.equal(more, argmax_loop(model, IDS[:1], MASK[:1], 10, **THRESHOLD))


# --- a skipped layer is not run ----------------------------------------------------------------------------


@contextmanager
def counted_rows(model: Any, module: str) -> Iterator[list[Counter[str]]]:
    """Per layer, how often `module` was called and how many tokens entered it."""
    counts = [Counter() for _ in range(LAYERS)]

    def count(layer: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            counts[layer]["calls"] += 1
            counts[layer]["tokens"] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    handles = [
        layer.get_submodule(module).register_forward_pre_hook(count(i))
        for i, layer in enumerate(model.model.layers)
    ]
    yield counts
    for handle in handles:
        handle.remove()


def skips_of(model: Any, ids: Tensor, mask: Tensor, text: Tensor) -> Tensor:
    """The trace [L, B, steps] of the decoded tokens that were fed (the last one never is)."""
    fed = torch.cat((mask, torch.ones_like(text[:, ids.shape[1] : -1])), dim=1)
    with torch.no_grad():
        skip = model(text[:, :-1], fed, decode_start=mask.sum(1), **THRESHOLD).skip
    return skip[:, :, ids.shape[1] :]


@pytest.mark.parametrize("module", ["mlp", "self_attn.q_proj", "self_attn.o_proj"])
@each_option
def test_a_skipped_layer_is_not_run(options: dict[str, Any], module: str) -> None:
    model = lively(**options)
    ids, mask = IDS[:1], torch.ones_like(IDS[:1])
    with counted_rows(model, module) as counts:
        text = model.generate(ids, max_new_tokens=24, do_sample=False, **THRESHOLD)
    skip = skips_of(model, ids, mask, text)
    assert 0.1 < skip.float().mean() < 0.7
    for layer in range(LAYERS):
        executed = int((~skip[layer]).sum())
        assert counts[layer] == {"calls": 1 + executed, "tokens": ids.shape[1] + executed}


@each_option
def test_rows_that_skip_do_not_enter_the_layer(options: dict[str, Any]) -> None:
    model = lively(**options)
    with counted_rows(model, "mlp") as counts:
        text = generate(model, max_new_tokens=24, **THRESHOLD)
    skip = skips_of(model, IDS, MASK, text)
    for layer in range(LAYERS):
        steps_run = int((~skip[layer].all(0)).sum())
        assert counts[layer]["calls"] == 1 + steps_run
        assert counts[layer]["tokens"] == IDS.numel() + int((~skip[layer]).sum())


@pytest.mark.parametrize("kv", ["project", "noop"])
def test_a_skipped_token_projects_keys_only_if_asked_to(kv: str) -> None:
    model = lively(kv_on_skip=kv)
    ids, mask = IDS[:1], torch.ones_like(IDS[:1])
    with counted_rows(model, "self_attn.k_proj") as counts:
        text = model.generate(ids, max_new_tokens=24, do_sample=False, **THRESHOLD)
    skip = skips_of(model, ids, mask, text)
    for layer in range(LAYERS):
        kept = skip.shape[2] if kv == "project" else int((~skip[layer]).sum())
        assert counts[layer]["tokens"] == ids.shape[1] + kept


def test_dense_decoding_computes_no_gate() -> None:
    """It is the baseline that skipping is compared with; only the prompt's pass looks at the gates."""
    model = lively(never_skip=tuple(range(1, LAYERS)))
    with counted_rows(model, "mlp") as counts:
        generate(model, gates="dense")
    assert all(count["calls"] == NEW for count in counts)
    calls: list[int] = []
    handle = model.model.layers[0].skip_gate.register_forward_hook(lambda *_: calls.append(1))
    generate(model, gates="dense")
    handle.remove()
    assert len(calls) == 1


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"cache_implementation": "static"}, ValueError, "does not know skipped layers"),
        ({"gates": "sample"}, ValueError, "needs gate_seed"),
        ({"gates": "threshold", "tau": 1.5}, ValueError, r"lies in \[0, 1\]"),
        ({"gates": "threshold", "tau": -0.1}, ValueError, r"lies in \[0, 1\]"),
        ({"gates": "often"}, ValueError, "must be one of dense, threshold, sample, replay"),
        ({"gates": "sample", "gate_seed": torch.tensor([1, 2])}, ValueError, "one a row"),
        ({"max_new_tokens": CONTEXT}, ValueError, "more than the model's context of 128"),
        ({"never_skip": [LAYERS], **THRESHOLD}, ValueError, "the model has layers 0 to 7"),
        ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "cannot be shortened"),
    ],
)
def test_refusals_are_sentences(call: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        generate(lively(), **call)


def test_assisted_generation_is_refused() -> None:
    model = lively()
    call = {"assistant_model": lively(**OPTIONS[0], tied=True), "max_new_tokens": NEW}
    with pytest.raises(NotImplementedError, match="cannot be shortened"):
        model.generate(IDS[:1], do_sample=False, **call)


def test_a_cache_cannot_be_cropped() -> None:
    with pytest.raises(NotImplementedError, match="cannot be shortened"):
        FBSCache(LAYERS).crop(3)


def test_prompts_longer_than_the_context_are_refused() -> None:
    ids = torch.zeros(1, CONTEXT + 1, dtype=torch.long)
    for call in (lively(), lambda ids: lively().generate(ids, max_new_tokens=1)):
        with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens are more than"):
            call(ids)


@pytest.mark.parametrize(
    ("skip", "words"),
    [
        (None, r"needs skip of shape .* = \(8, 1, 9\), got None"),
        (torch.zeros(LAYERS, 1, 8, dtype=torch.bool), r"got \(8, 1, 8\)"),
        (torch.ones(LAYERS, 1, 9, dtype=torch.bool), r"layers that never skip \(\[2\]\)"),
    ],
)
def test_replayed_actions_must_fit(skip: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lively()(IDS[:1], gates="replay", skip=skip)


def test_replayed_actions_may_not_touch_the_prompt() -> None:
    skip = torch.zeros(LAYERS, 1, 9, dtype=torch.bool)
    skip[5, 0, 3] = True
    with pytest.raises(ValueError, match="prompt tokens never skip"):
        lively()(IDS[:1], gates="replay", skip=skip, decode_start=4)
    with torch.no_grad():
        assert lively()(IDS[:1], gates="replay", skip=skip, decode_start=3).skip[5, 0, 3]


def test_other_caches_are_refused() -> None:
    model = lively()
    with pytest.raises(ValueError, match="is a list; an FBS model needs an FBSCache"):
        model(IDS, past_key_values=[])
    with pytest.raises(ValueError, match="exactly one of them"):
        model(IDS, inputs_embeds=torch.zeros(3, VOCAB, 48))
    with pytest.raises(ValueError, match="without a cache"):
        model(IDS, labels=IDS, past_key_values=FBSCache(LAYERS))
