"""An engine of the test's own, what it is asked, and where its answers differ from the referee's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fbs_rl.gate_bundle import GateBundle, GateParts, apply_bundle, gate_tensors
from tests.served_tiny import make_folder, referee
from tests.tiny import VOCAB

MASKED = {"fbs": {"decode_path": "masked"}}
COMPACT = {"fbs": {"native_gib": 0}}


def start(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    settings = {
        "max_num_seqs": 6, "block_size": 32, "max_model_len": 256, "disable_log_stats": False, **options,
    }  # fmt: skip
    llm = LLM(str(folder), skip_tokenizer_init=True, dtype="float32", **settings)
    poison(llm)
    return llm


def poison(llm: Any) -> None:
    """Large numbers in every page that nobody wrote: reading one would show."""
    for layer in served_model(llm).layers:
        layer.self_attn.attn.kv_cache.fill_(1e4)


def served_model(llm: Any) -> Any:
    """The ServedModel of an engine in this process."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    return worker.model_runner.get_model().model


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(n)] for n in lengths]


LENGTHS = (1, 3, 40, 31, 32, 33, 90, 17)


def generate(
    llm: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int], options: Sequence[dict[str, Any]],
    **sampling: Any,
) -> tuple[list[list[int]], list[Any]]:  # fmt: skip
    """(tokens, traces) of each prompt; request keys are filled in."""
    from vllm import SamplingParams

    from fbs_rl.serving.client import take_traces

    keys = [f"key {i}" for i in range(len(prompts))]
    params = [
        SamplingParams(
            max_tokens=n, ignore_eos=True, detokenize=False, extra_args={"request_key": key, **given},
            **{"temperature": 0, **sampling},
        )
        for key, n, given in zip(keys, tokens, options, strict=True)
    ]  # fmt: skip
    made = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    outputs = [list(m.outputs[0].token_ids) for m in made]
    traces = take_traces(llm, keys)
    return outputs, [t.first(len(o) - 1) for t, o in zip(traces, outputs, strict=True)]


def differences(
    model: Any, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], traces: Sequence[Any],
    gates: Sequence[dict[str, Any]], greedy: bool = True, tolerance: float = 1e-5,
) -> list[str]:  # fmt: skip
    """What is not as the referee has it, and the largest difference of a probability above the tolerance."""
    wrong = []
    for i, (prompt, output, trace, given) in enumerate(zip(prompts, outputs, traces, gates, strict=True)):  # fmt: skip
        found = referee(model, prompt, output, **given)
        if greedy and list(output) != found.chosen:
            wrong.append(f"tokens of request {i}")
        if not torch.equal(torch.from_numpy(trace.skip_TL), found.skip_TL):
            wrong.append(f"actions of request {i}")
        free_TL = found.prob_TL * (torch.from_numpy(trace.prob_TL) > 0)
        worst = float((torch.from_numpy(trace.prob_TL) - free_TL).abs().max())
        if worst > tolerance:
            wrong.append(f"probability of request {i} by {worst}")
    return wrong


def serve_and_compare(
    folder: Path, family: str = "llama", sampled: bool = False, engine: dict[str, Any] | None = None,
    tokens: int = 20, **model_options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Serve eight prompts of awkward lengths and compare with the referee; figures to check that it says something."""
    model = make_folder(folder, family, **model_options)
    llm = start(folder, **(engine or {}))
    prompts = random_prompts(1, LENGTHS)
    counts = [tokens + 4 * i for i in range(len(prompts))]
    ours = [{"gate_seed": 7 + i} if sampled else {"tau": 0.5} for i in range(len(prompts))]
    gates = [{**given, "gates": "sample" if sampled else "threshold"} for given in ours]
    outputs, traces = generate(llm, prompts, counts, ours)
    return {
        "wrong": differences(model, prompts, outputs, traces, gates),
        "native": served_model(llm).native is not None,
        "skip": sum(t.skip_TL.sum() for t in traces) / sum(t.skip_TL.size for t in traces),
        "replayed": sum(t.replayed_tokens for t in traces),
        "closes": sum(int(t.closes_T.sum()) for t in traces),
    }


def changed_gates(model: Any, version: int, parts: str = "gates") -> GateBundle:
    """Other gates: their last bias shifted up and down from layer to layer, previews scaled."""
    tensors = {n: t.detach().clone() for n, t in gate_tensors(model, GateParts(parts)).items()}
    for i, name in enumerate(n for n in tensors if n.endswith("skip_gate.out.bias")):
        tensors[name] += 0.7 * version * (-1) ** i
    for name in tensors:
        if name.endswith("up.weight") and ".paw." in name:
            tensors[name] *= 1.5
    return GateBundle.of(version, tensors)


def padded(skip_TL: torch.Tensor, prompt: int) -> torch.Tensor:
    """Actions [L, 1, T] of a whole sequence from those of its decoded tokens."""
    none = skip_TL.new_zeros
    whole = torch.cat((none(prompt, skip_TL.shape[1]), skip_TL, none(1, skip_TL.shape[1])))
    return whole.T.unsqueeze(1)


def exchange_gates(llm: Any, model: Any, parts: str) -> None:
    """Other gates for the engine and for the model that it is held against."""
    from fbs_rl.serving.client import update_gates

    bundle = changed_gates(model, 1, parts)
    update_gates(llm, bundle)
    apply_bundle({**dict(model.named_parameters()), **dict(model.named_buffers())}, bundle)
    model.model.forget_derived()


class Again:
    """A recorder: it runs the work itself."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work
