"""Gates that change under a served model: between generations, within one, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fbs_rl.gate_bundle import GateBundle
from tests.served_engine import (
    LENGTHS,
    changed_gates,
    differences,
    generate,
    padded,
    random_prompts,
    start,
)
from tests.served_tiny import make_folder, referee
from tests.tiny import NOOP


def serve_updates_between(folder: Path, parts: str, options: dict[str, Any]) -> dict[str, Any]:
    from fbs_rl.gate_bundle import apply_bundle
    from fbs_rl.serving.client import update_gates

    model = make_folder(folder, **options)
    llm = start(folder, enable_prefix_caching=not options.get("chunk", True))
    prompts = random_prompts(1, LENGTHS)
    wrong, versions, skips = [], [], []
    for version in range(3):
        if version:
            bundle = changed_gates(model, version, parts)
            update_gates(llm, bundle)
            apply_bundle(dict(model.named_parameters()), bundle)
            model.model.forget_derived()
        outputs, traces = generate(llm, prompts, [24] * 8, [{"tau": 0.5}] * 8)
        gates = [{"gates": "threshold", "tau": 0.5}] * 8
        wrong += differences(model, prompts, outputs, traces, gates)
        versions.append({int(v) for t in traces for v in t.version_T})
        skips.append(b"".join(t.skip_TL.tobytes() for t in traces))
    return {"wrong": wrong, "versions": versions, "differ": len(set(skips))}


@pytest.mark.parametrize("parts", ["gates", "gates+paw"])
@pytest.mark.parametrize("options", [{}, {"chunk": False, **NOOP}])
def test_updates_between_generations(
    there: Callable[..., Any], tmp_path: Path, parts: str, options: dict[str, Any]
) -> None:
    found = there(serve_updates_between, tmp_path / "model", parts, options)
    assert found["wrong"] == []
    assert found["versions"] == [{0}, {1}, {2}] and found["differ"] == 3


def serve_update_within(folder: Path) -> dict[str, Any]:
    """New gates after a dozen steps: each token's actions are those of the gates that it was fed under."""
    from vllm import SamplingParams

    from fbs_rl.gate_bundle import apply_bundle
    from fbs_rl.serving.client import take_traces, update_gates

    model = make_folder(folder)
    llm = start(folder)
    engine, prompt = llm.llm_engine, random_prompts(1, [23])[0]
    options = {"request_key": "x", "tau": 0.5}
    params = SamplingParams(
        max_tokens=40, temperature=0, ignore_eos=True, detokenize=False, extra_args=options
    )
    engine.add_request("r", {"prompt_token_ids": prompt}, params)
    bundle, output = changed_gates(model, 1), []
    for step in range(40):
        if step == 12:
            update_gates(llm, bundle)
        for made in engine.step():
            output = list(made.outputs[0].token_ids)
    trace = take_traces(llm, ["x"])[0].first(len(output) - 1)
    before = referee(model, prompt, output[:12], gates="threshold", tau=0.5)
    apply_bundle(dict(model.named_parameters()), bundle)
    skip_TL = torch.from_numpy(trace.skip_TL)
    whole = referee(model, prompt, output, gates="replay", skip=padded(skip_TL, len(prompt)))
    prob_TL = torch.from_numpy(trace.prob_TL)
    free = prob_TL > 0
    return {
        "before": torch.equal(skip_TL[:11], before.skip_TL),
        "tokens": whole.chosen == output,
        "after": bool((skip_TL[11:] == ((whole.prob_TL >= 0.5) & free)[11:]).all()),
        "versions": trace.version_T.tolist(),
    }


def test_an_update_within_a_generation(there: Callable[..., Any], tmp_path: Path) -> None:
    found = there(serve_update_within, tmp_path / "model")
    assert found["before"] and found["tokens"] and found["after"], found
    assert found["versions"] == [0] * 11 + [1] * 28


def refuse_bad_gates(folder: Path) -> list[str]:
    """Sentences for bundles that do not fit; the gates are the old ones after each."""
    from fbs_rl.serving.client import update_gates

    model = make_folder(folder)
    llm = start(folder)
    good = changed_gates(model, 1)
    name = next(iter(good.tensors))
    bad = {
        "name": GateBundle.of(2, {**good.tensors, "model.layers.99.skip_gate.out.bias": torch.zeros(1)}),
        "shape": GateBundle.of(2, {**good.tensors, name: torch.zeros(3, 3)}),
        "digest": GateBundle(2, "0" * 64, good.tensors),
        "finite": GateBundle.of(2, {**good.tensors, name: good.tensors[name] * torch.nan}),
        "old": GateBundle.of(0, good.tensors),
    }  # fmt: skip
    update_gates(llm, good)
    sentences = []
    digest = llm.collective_rpc("fbs_gates")[0]
    for bundle in bad.values():
        try:
            update_gates(llm, bundle)
            sentences.append("accepted")
        except Exception as error:
            sentences.append(str(error))
        assert llm.collective_rpc("fbs_gates")[0] == digest
    return sentences


def test_gates_that_do_not_fit_are_refused(there: Callable[..., Any], tmp_path: Path) -> None:
    name, shape, digest, finite, old = there(refuse_bad_gates, tmp_path / "model")
    assert "model.layers.99" in name and "has shape (3, 3)" in shape
    assert "altered" in digest and "not finite" in finite and "older than 1" in old
