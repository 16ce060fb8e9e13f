"""The graph decoder makes the decisions and logits of the model's own pass, on the kernels' source itself."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fbs_rl.bench_engine import held_logits
from fbs_rl.decode.graph_decoder import DecodeTrace, GraphDecoder, RowsDecide
from fbs_rl.decode.kernel_arguments import Call
from fbs_rl.decode.program import Program
from fbs_rl.decode.step_program import kernel_shape
from fbs_rl.decode.supported import check_supported
from fbs_rl.latency_engines import hold_gates
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import count_trace
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.types import FBSOutput, GateMode
from tests.cuda_emulator import EmulationError
from tests.decode_launchers import PLACES, make_launcher
from tests.tiny import NOOP, SMALL, VOCAB, backbone, enliven, fresh, lively

PROMPT, STEPS = 40, 4  # more than 32 entries: attention in more than one part
OFF = {"paw": False, "chunk": False}
CASES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("qwen3", 1, "dense", {"gate": False, **OFF}),
    ("llama", 2, "dense", {"bias": True}),
    ("qwen3", 2, "threshold", {}),
    ("qwen3", 1, "sample", {**NOOP, "chunk_cache": 3}),
    ("llama", 2, "threshold", {"gate_block": 4, "never_skip": (5,), "gate_inputs": "residual", **NOOP}),
    ("qwen3", 1, "threshold", {"gate_block": 2}),
    ("llama", 2, "sample", {"gate_block": 3, "gate_residual_width": 71, "gate_hidden": 80, "paw_rank": 80,
                            "gate_preview_width": 70, "paw_horizon": 9}),
    ("qwen3", 1, "threshold", {"gate_ahead": 1, "paw_layers": (0,), "never_skip": (4,)}),
    ("llama", 2, "sample", {"gate_ahead": 1, "paw_layers": (0,)}),
    ("llama", 1, "sample", {"gate_ahead": 1, **NOOP}),
    ("qwen3", 2, "threshold", {"gate_ahead": 1, "gate_block": 2, "never_skip": (6,), "kv_on_skip": "noop"}),
    ("qwen3", 1, "threshold", {"gate_ahead": 1, "gate_block": 3, "skip_path": "identity", "paw_layers": "all"}),
    ("qwen3", 1, "threshold", {"paw_window": "fixed", "paw_compression": "mean", "gate_inputs": "preview"}),
]  # fmt: skip


def tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gates_of(mode: str, rows: int) -> dict[str, Any]:
    return {
        "dense": {},
        "threshold": {"tau": 0.5},
        "sample": {"gate_seed": torch.arange(rows) * 2**33 - 7},
    }[mode]


@torch.no_grad()
def refereed(model: Any, prompt: Tensor, fed: Tensor, mode: str, gates: dict[str, Any]) -> FBSOutput:  # fmt: skip
    """The parallel pass over prompt and answer, gates acting behind the prompt."""
    return model(
        torch.cat((prompt, fed), 1), gates=mode, decode_start=prompt.shape[1], use_cache=False, **gates
    )  # fmt: skip


def decoder_of(model: Any, place: str, rows: int, mode: str, **options: Any) -> GraphDecoder:
    placed = copy.deepcopy(model)
    if place == "cuda":
        placed.cuda()
    launcher = make_launcher(place, kernel_shape(model, rows))
    return GraphDecoder(placed, rows, PROMPT + STEPS, gates=mode, launcher=launcher, **options)


def forced(
    decoder: GraphDecoder, prompt: Tensor, fed: Tensor, gates: dict[str, Any]
) -> tuple[DecodeTrace, Tensor]:
    """The trace, and the logits of every step [B, T, V]."""
    decoder.prefill(prompt, **gates)
    decoder.force(fed.to(decoder.launcher.device))
    logits = []
    for _ in range(fed.shape[1]):
        decoder.step()
        logits.append(decoder.logits_BV.cpu().clone())
    return decoder.trace(), torch.stack(logits, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("family", "rows", "mode", "options"), CASES)
def test_decisions_and_logits_are_those_of_the_parallel_pass(
    place: str, family: str, rows: int, mode: str, options: dict[str, Any]
) -> None:
    model = lively(family, **options)
    prompt, fed, gates = tokens(rows, PROMPT, 1), tokens(rows, STEPS, 2), gates_of(mode, rows)
    wanted = refereed(model, prompt, fed, mode, gates)
    found, logits = forced(decoder_of(model, place, rows, mode), prompt, fed, gates)
    assert wanted.skip is not None and wanted.logits is not None and wanted.gate_prob is not None
    assert torch.equal(found.skip_LBT, wanted.skip[:, :, PROMPT:])
    torch.testing.assert_close(logits, wanted.logits[:, PROMPT:], atol=1e-5, rtol=1e-5)
    if mode != "dense":
        assert 0.1 < found.skip_LBT.float().mean() < 0.8
        prob = wanted.gate_prob[:, :, PROMPT:]
        torch.testing.assert_close(found.prob_LBT, prob, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.token_BT[:, :STEPS], fed)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_guesses_that_hold_and_guesses_that_fail(place: str, rows: int) -> None:
    """A layer is taken to do what it did at the token before, and goes its way in another order by that. Of two rows
    both must, so these are the same."""
    model = lively("llama", paw_layers=(0,), chunk=False)
    prompt, fed = (
        tokens(1, length, seed).repeat(rows, 1) for length, seed in ((PROMPT, 1), (STEPS, 2))
    )
    gates = {"gate_seed": torch.full((rows,), 5)}
    wanted = refereed(model, prompt, fed, "sample", gates)
    decoder = decoder_of(model, place, rows, "sample")
    found, logits = forced(decoder, prompt, fed, gates)
    guessed = [c.name == "product_qkv_front" for c in decoder.program.calls].count(True)
    all_LT = found.skip_LBT[-guessed:].all(1)
    before_LT = torch.cat((torch.zeros(guessed, 1, dtype=torch.bool), all_LT[:, :-1]), 1)
    assert len(set(zip(before_LT.flatten().tolist(), all_LT.flatten().tolist(), strict=True))) == 4
    assert wanted.skip is not None and wanted.logits is not None
    assert torch.equal(found.skip_LBT, wanted.skip[:, :, PROMPT:])
    torch.testing.assert_close(logits, wanted.logits[:, PROMPT:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_blocks_without_a_part_in_a_product_decide_too(place: str) -> None:
    """Gate and up of so few rows that not every multiprocessor has some; a decision is taken along with them."""
    config = copy.deepcopy(backbone().config)
    config.intermediate_size = 4
    torch.manual_seed(3)
    base: Any = LlamaForCausalLM(config).eval()
    model = enliven(
        FBSForCausalLM.from_backbone(base, FBSConfig(**SMALL, gate_ahead=1, chunk=False))
    )
    prompt, fed, gates = tokens(1, PROMPT, 1), tokens(1, STEPS, 2), gates_of("threshold", 1)
    wanted = refereed(model, prompt, fed, "threshold", gates)
    decoder = decoder_of(model, place, 1, "threshold")
    taken = [c for c in decoder.writer.calls if c.name == "product_gate_up" and c.sets]
    pairs = config.intermediate_size
    each = [-(-pairs // call.arguments.weights.blocks) for call in taken]
    assert taken and all(-(-pairs // n) < decoder.launcher.multiprocessors for n in each)
    found, logits = forced(decoder, prompt, fed, gates)
    assert wanted.skip is not None and wanted.logits is not None
    assert torch.equal(found.skip_LBT, wanted.skip[:, :, PROMPT:])
    torch.testing.assert_close(logits, wanted.logits[:, PROMPT:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{}, NOOP], ids=["default", "noop"])
def test_bfloat16_with_decisions_ahead(place: str, options: dict[str, Any], rows: int) -> None:
    """Gates that are certain, so that rounding flips none: some layers are skipped by all rows, some by none."""
    model = fresh("qwen3", paw_layers=(0,), chunk=False, gate_ahead=1, **options)
    model = enliven(model).bfloat16()
    hold_gates(model, held_logits(model.config, 0.5, apart=False))
    prompt, fed = tokens(rows, PROMPT, 1), tokens(rows, STEPS, 2)
    wanted = refereed(model, prompt, fed, "threshold", {"tau": 0.5})
    found, logits = forced(decoder_of(model, place, rows, "threshold"), prompt, fed, {"tau": 0.5})
    assert wanted.skip is not None and wanted.logits is not None
    assert torch.equal(found.skip_LBT, wanted.skip[:, :, PROMPT:])
    assert found.skip_LBT.float().mean() == 0.5
    error = (logits.float() - wanted.logits[:, PROMPT:].float()).norm()
    assert error < 0.03 * wanted.logits[:, PROMPT:].float().norm()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{"chunk_cache": 3}, NOOP], ids=["default", "noop"])
def test_prompts_of_a_length_that_was_told_of(place: str, options: dict[str, Any]) -> None:
    """Where there are CUDA graphs one is captured for them; others go on as before."""
    model = lively("qwen3", **options)
    ready = decoder_of(model, place, 2, "threshold", prompt_lengths=(PROMPT,))
    other = decoder_of(model, place, 2, "threshold")
    fed = tokens(2, STEPS, 2)
    for length, seed in ((PROMPT, 1), (PROMPT - 9, 3), (PROMPT, 4)):
        prompt = tokens(2, length, seed)
        found, logits = forced(ready, prompt, fed, {"tau": 0.5})
        wanted, theirs = forced(other, prompt, fed, {"tau": 0.5})
        assert torch.equal(found.skip_LBT, wanted.skip_LBT)
        torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
        if wanted.closed_chunks_BT is not None:
            assert found.closed_chunks_BT is not None
            assert torch.equal(found.closed_chunks_BT, wanted.closed_chunks_BT)
    with pytest.raises(
        ValueError, match=r"2 rows of 44 tokens; this decoder takes 2 rows of 1 to 43"
    ):
        decoder_of(model, place, 2, "threshold", prompt_lengths=(PROMPT + STEPS,))


@pytest.mark.parametrize("place", PLACES)
def test_greedy_tokens_and_chunks_are_those_of_the_cached_pass(place: str) -> None:
    """And a decoder that is used again forgets what it decoded before."""
    model = lively("qwen3")
    prompt, cache = tokens(1, PROMPT, 3), FBSCache(model.config.layer_count)
    fed, closed, skips = [], [], []
    with torch.no_grad():
        out = model(prompt, past_key_values=cache, gates="threshold", tau=0.5)
        for _ in range(STEPS):
            fed.append(out.logits[:, -1].argmax(-1, keepdim=True))
            assert cache.chunks is not None
            closed.append(cache.chunks.closed_B.clone())
            out = model(fed[-1], past_key_values=cache, gates="threshold", tau=0.5)
            skips.append(out.skip)
    decoder = decoder_of(model, place, 1, "threshold")
    for turn in (prompt.flip(1), prompt):
        decoder.prefill(turn, tau=0.5)
        decoder.step(STEPS)
    found = decoder.trace()
    last = out.logits[:, -1].argmax(-1, keepdim=True)
    assert torch.equal(found.token_BT, torch.cat([*fed, last], 1))
    assert torch.equal(found.skip_LBT, torch.cat(skips, 2))
    assert found.closed_chunks_BT is not None and found.opens_BT is not None
    assert torch.equal(found.closed_chunks_BT, torch.stack(closed, 1))
    start_B = torch.tensor([PROMPT])
    cost = count_trace(model.config, found.skip_LBT, start_B, True, found.closed_chunks_BT, found.opens_BT)  # fmt: skip
    assert cost.skip_ratio == found.skip_LBT.double().mean()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{}, NOOP])
def test_prompts_of_unequal_length_decode_as_they_would_alone(
    place: str, options: dict[str, Any]
) -> None:
    model, prompt = lively("qwen3", **options), tokens(2, PROMPT, 10)
    mask = torch.ones_like(prompt)
    mask[0, :11] = 0
    together = decoder_of(model, place, 2, "threshold")
    together.prefill(prompt, tau=0.5, mask_BT=mask)
    together.step(STEPS)
    found = together.trace()
    assert found.start_B.tolist() == [PROMPT - 11, PROMPT]
    for row in range(2):
        alone = decoder_of(model, place, 1, "threshold")
        alone.prefill(prompt[row : row + 1, mask[row] == 1], tau=0.5)
        alone.step(STEPS)
        wanted = alone.trace()
        assert torch.equal(found.token_BT[row], wanted.token_BT[0])
        assert torch.equal(found.skip_LBT[:, row], wanted.skip_LBT[:, 0])
        torch.testing.assert_close(found.prob_LBT[:, row], wanted.prob_LBT[:, 0], atol=1e-5, rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_decoding_ends_when_every_row_has(place: str) -> None:
    model, prompt = lively("qwen3", gate=False, **OFF), tokens(2, PROMPT, 11)
    decoder = decoder_of(model, place, 2, "dense")
    decoder.prefill(prompt)
    whole = decoder.decode(STEPS, end_ids=())
    assert [len(text) for text in whole] == [STEPS + 1, STEPS + 1]
    ends = {whole[0][1], whole[1][0]}
    decoder.prefill(prompt)
    texts = decoder.decode(STEPS, end_ids=ends, look_every=1)
    for text, full in zip(texts, whole, strict=True):
        last = next(i for i, token in enumerate(full) if token in ends)
        assert text == full[: last + 1]
    assert decoder.taken < STEPS


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_decide_together_skip_by_the_mean(place: str) -> None:
    """In the first step both rows' probabilities are the referee's, so the common decision is known."""
    model = lively("qwen3")
    prompt, fed = tokens(2, PROMPT, 4), tokens(2, 1, 5)
    wanted = refereed(model, prompt, fed, "threshold", {"tau": 1.0}).gate_prob
    assert wanted is not None
    first_gate = wanted[0, :, -1]  # before any skip: what the referee saw, too
    decoder = decoder_of(model, place, 2, "threshold", rows_decide=RowsDecide.TOGETHER)
    low, high = sorted(first_gate.tolist())
    for tau, skipped in (((low + high) / 2 - 1e-3, True), ((low + high) / 2 + 1e-3, False)):
        found, _ = forced(decoder, prompt, fed, {"tau": tau})
        assert found.skip_LBT[0, :, 0].tolist() == [skipped, skipped]
        assert bool((found.skip_LBT[:, 0] == found.skip_LBT[:, 1]).all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_follower_asks_its_skip_adapter_only_where_somebody_skips(place: str, rows: int) -> None:
    """Layers behind the first of a block have nothing else to ask; they are the odd ones here."""
    decoder = decoder_of(lively("qwen3", gate_block=2), place, rows, "threshold")
    buffers, prompt, fed = decoder.writer.layers, tokens(rows, PROMPT, 12), tokens(rows, 1, 13)
    adapter_BR = buffers.front(1)[:, : decoder.model.config.adapter_rank]
    for tau, asked in ((1.0, False), (0.0, True)):
        adapter_BR.fill_(torch.nan)
        found, _ = forced(decoder, prompt, fed, {"tau": tau})
        assert bool(found.skip_LBT[1].all()) == asked
        assert bool(adapter_BR.isnan().any()) != asked


@pytest.mark.parametrize("place", PLACES)
def test_changed_gates_act_without_a_new_graph(place: str) -> None:
    model = lively("qwen3", **OFF, gate_inputs="residual")
    decoder = decoder_of(model, place, 1, "threshold")
    prompt, fed = tokens(1, PROMPT, 6), tokens(1, 1, 7)
    with torch.no_grad():
        for layer in decoder.model.model.fbs_layers():
            if layer.skip_gate is not None:
                layer.skip_gate.reduce.weight.neg_()
    decoder.refresh_weights()
    found, _ = forced(decoder, prompt, fed, {"tau": 0.5})
    wanted = refereed(decoder.model.cpu(), prompt, fed, "threshold", {"tau": 0.5}).gate_prob
    assert wanted is not None
    torch.testing.assert_close(found.prob_LBT[..., 0], wanted[..., -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"paw_rank": 48, "paw_shortlist": 30}, NOOP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_keeps_to_the_room_it_asks_for(dtype: torch.dtype, options: Any) -> None:
    """Each alone: in a program the largest one's room would hide it. The emulator looks behind the room."""
    model = copy.deepcopy(lively("qwen3", **options)).to(dtype)
    decoder = decoder_of(model, "emulated", 2, "threshold")

    def keeps(call: Call) -> bool:
        try:
            decoder.launcher.run(Program.of([call], decoder.shape, 3, torch.device("cpu")), 0, 1)
        except EmulationError:
            return False
        return True

    assert [call.name for call in decoder.writer.calls if not keeps(call)] == []
    product = next(call for call in decoder.writer.calls if call.name == "product_logits")
    assert not keeps(dataclasses.replace(product, room_bytes=128))  # less than it needs is noticed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segment_position": True}, "segment_position"),
        ({"paw_embed_space": "full"}, 'paw_embed_space "full"'),
        ({"paw_compression": "linear"}, 'paw_compression "linear"'),
    ],
)
def test_what_is_not_supported_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_supported(fresh(**options), GateMode.DENSE, 8)


def test_replay_and_long_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="does not replay"):
        check_supported(fresh(), GateMode.REPLAY, 8)
    with pytest.raises(ValueError, match="context of 128"):
        check_supported(fresh(), GateMode.DENSE, 129)
    with pytest.raises(ValueError, match="made without gates"):
        check_supported(fresh(gate=False), GateMode.THRESHOLD, 8)


def test_without_cuda_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device .* fbs_rl\.decoding"):
        GraphDecoder(fresh(), 1, 16)


@pytest.mark.parametrize("place", PLACES)
def test_calls_that_do_not_fit_are_refused(place: str) -> None:
    decoder = decoder_of(lively("qwen3", gate=False, **OFF), place, 1, "dense")
    with pytest.raises(ValueError, match="prefill first"):
        decoder.step()
    with pytest.raises(ValueError, match="takes 1 rows of 1 to 43"):
        decoder.prefill(tokens(2, 5, 8))
    with pytest.raises(ValueError, match="pad shorter prompts in front"):
        decoder.prefill(tokens(1, 5, 8), mask_BT=torch.tensor([[1, 1, 1, 1, 0]]))
    decoder.prefill(tokens(1, PROMPT, 9))
    with pytest.raises(ValueError, match="do not fit 44 tokens"):
        decoder.step(STEPS + 1)
