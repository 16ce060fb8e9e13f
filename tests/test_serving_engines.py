"""The plugin on SmolLM2's own weights, and with its engine in a process of its own as deployments have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.served_engine import LENGTHS, changed_gates, differences, generate, random_prompts, start
from tests.served_tiny import make_folder


def serve_smollm2(folder: Path) -> dict[str, Any]:
    """Random prompts on the real weights; gates of random weights, about half of which skip."""
    from fbs_rl.model import FBSForCausalLM

    model = FBSForCausalLM.from_backbone("smollm2-135m", dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.model.new_parameters():
            if name.endswith("skip_gate.out.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
            elif name.endswith("skip_gate.out.bias"):
                parameter.fill_(-1.0)
            elif name.endswith("strength"):
                parameter.fill_(0.02)
    model.save_pretrained(folder)
    llm = start(folder, max_num_seqs=4)
    prompts = random_prompts(9, [12, 40, 3, 70])
    outputs, traces = generate(llm, prompts, [24] * 4, [{"tau": 0.5}, {"gate_seed": 4}] * 2)
    gates = [{"gates": "threshold", "tau": 0.5}, {"gates": "sample", "gate_seed": 4}] * 2
    return {
        "wrong": differences(model, prompts, outputs, traces, gates, tolerance=1e-4),
        "skip": [float(t.skip_TL.mean()) for t in traces],
    }


@pytest.mark.real_weights
def test_smollm2_is_served_as_the_referee_has_it(there: Callable[..., Any], tmp_path: Path) -> None:
    found = there(serve_smollm2, tmp_path / "model")
    assert found["wrong"] == []
    assert all(0.05 < skip < 0.95 for skip in found["skip"]), found["skip"]


def serve_in_a_process(folder: Path) -> dict[str, Any]:
    """Traces, an update and scores through the wire that separates client and engine."""
    import os

    from vllm import LLM

    from fbs_rl.gate_bundle import apply_bundle
    from fbs_rl.serving.client import score, update_gates

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    model = make_folder(folder)
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_seqs=6, block_size=32
    )  # fmt: skip
    prompts = random_prompts(1, LENGTHS)
    gates, wrong = [{"gates": "threshold", "tau": 0.5}] * 8, []
    for version in range(2):
        if version:
            bundle = changed_gates(model, version, "gates+paw")
            update_gates(llm, bundle)
            apply_bundle(dict(model.named_parameters()), bundle)
            model.model.forget_derived()
        outputs, traces = generate(llm, prompts, [24] * 8, [{"tau": 0.5}] * 8)
        wrong += differences(model, prompts, outputs, traces, gates)
    pairs = [(p, o) for p, o in zip(prompts, outputs, strict=True)]
    scored = score(llm, pairs, [{"tau": 0.5, "request_key": str(i)} for i in range(8)])
    same = [bool((s.trace.skip_TL == t.skip_TL).all()) for s, t in zip(scored, traces, strict=True)]
    del llm
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {"wrong": wrong, "same": same}


def test_an_engine_in_its_own_process(there: Callable[..., Any], tmp_path: Path) -> None:
    found = there(serve_in_a_process, tmp_path / "model")
    assert found["wrong"] == [] and all(found["same"])


def draw_behind_long_prompts(folder: Path) -> list[list[list[int]]]:
    """Seeded sampling at temperature 1, prompts in one piece and cut into pieces."""
    make_folder(folder)
    prompts = random_prompts(5, [90, 7, 70])
    found = []
    for pieces in ({}, {"max_num_batched_tokens": 32}):
        llm = start(folder, **pieces)
        tokens, _ = generate(llm, prompts, [12] * 3, [{"tau": 0.5}] * 3, temperature=1.0, seed=3)
        found.append(tokens)
        del llm
    return found


def test_seeded_tokens_do_not_depend_on_how_a_prompt_is_cut(
    there: Callable[..., Any], tmp_path: Path
) -> None:
    whole, cut = there(draw_behind_long_prompts, tmp_path / "model")
    assert whole == cut
    assert len({tuple(tokens) for tokens in whole}) == 3
