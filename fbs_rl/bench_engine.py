"""One vLLM engine in a process of its own, for the benches: generates when it is told to.

vLLM changes the process that it runs in, and two engines in one would compete for its threads.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from fbs_rl.gate_bundle import GateBundle
from fbs_rl.gate_trace import GateTrace
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import step_bytes

_CERTAIN = 50.0  # a logit that the gate's clip makes its own


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to serve. rows: the most of a round; prompt_tokens, new_tokens: of each. options: of vllm.LLM, besides.

    platform: "cpu" or "cuda", which vLLM must have been built for; "": either.
    """

    folder: str
    dtype: str
    rows: int
    prompt_tokens: int
    new_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    platform: str = ""


@dataclass(frozen=True, slots=True)
class RoundSpec:
    """One generation. share: of layers to skip; None: an engine without gates.

    apart: each row samples its own skips; else all rows skip the same layers at every token.
    """

    rows: int
    share: float | None
    apart: bool


@dataclass(frozen=True, slots=True)
class Round:
    """One generation as measured: medians over its decoding steps, and what its traces say.

    flops_ratio: executed over those of the plain backbone. weights: read by a step, mean; 0 without traces.
    """

    cpu_s: float
    wall_s: float
    skip_ratio: float = 0.0
    flops_ratio: float = 1.0
    weights: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request of `rows` random prompts, timed token by token. seed: of the prompts.

    gates: extra_args of every row; None: an engine without gates. logit_L: what each layer's gate is to
    answer, None: what it answers by itself.
    """

    rows: int
    seed: int
    gates: dict[str, Any] | None = None
    logit_L: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """That request as measured. arrival_T: seconds until all rows had their first, second, ... new token.

    traces: of its rows; none from an engine without gates.
    """

    arrival_T: list[float]
    traces: list[GateTrace]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself: vLLM's version, its compilation mode and which CUDA graphs it has."""

    vllm: str
    compilation: str
    cuda_graphs: str


def serve_engine(connection: Connection, spec: EngineSpec) -> None:
    """The process: starts the engine, sends its EngineFacts, then answers each RoundSpec with a Round and each
    RequestSpec with a Request; any failure is answered with its text."""
    os.dup2(2, 1)  # what vLLM prints must not be taken for the bench's own output
    os.setsid()  # a signal to all of the bench's processes is for the bench alone, which ends its round
    try:
        engine = _Engine(spec)
        connection.send(engine.facts())
        while True:
            connection.send(engine.answer(connection.recv()))
    except EOFError:
        return
    except Exception as error:
        connection.send(_said(error))
        raise


def _said(error: Exception) -> str:
    """What went wrong, in a line: vLLM checks its options with pydantic, which wraps a sentence in several."""
    wrapped = re.search(r"Value error, (.*?) \[type=", str(error))
    return f"{type(error).__name__}: {error}" if wrapped is None else wrapped.group(1)


class _Engine:
    def __init__(self, spec: EngineSpec) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        from fbs_rl.serving.plugin import register

        built_for = str(current_platform.device_type)
        if spec.platform not in ("", built_for):
            raise ValueError(f"vLLM runs on {built_for} here; give --device {built_for}")
        register()  # also where fbs_rl lies on the path and is not installed
        self.spec, self.served, self.version = spec, 0, 0
        settings: dict[str, Any] = {
            "max_model_len": spec.prompt_tokens + spec.new_tokens + 1,
            "max_num_seqs": spec.rows,
            # A round's prompts make one step.
            "max_num_batched_tokens": max(2048, spec.rows * (spec.prompt_tokens + spec.new_tokens + 1)),
            "enable_prefix_caching": False,
            **spec.options,
        }  # fmt: skip
        dtype: Any = spec.dtype
        self.llm = LLM(spec.folder, skip_tokenizer_init=True, dtype=dtype, **settings)
        self.config: Any = self.llm.llm_engine.vllm_config.model_config.hf_config

    def facts(self) -> EngineFacts:
        import vllm

        config: Any = self.llm.llm_engine.vllm_config
        compilation = config.compilation_config
        # The plugin's graphs are its own.
        ours = (config.additional_config or {}).get("fbs", {})
        graphs = ours.get("graphs", compilation.cudagraph_mode.name.lower())
        return EngineFacts(vllm.__version__, compilation.mode.name.lower(), graphs)

    def answer(self, asked: RoundSpec | RequestSpec) -> Round | Request:
        return self.run(asked) if isinstance(asked, RoundSpec) else self.request(asked)

    def request(self, asked: RequestSpec) -> Request:
        if asked.logit_L is not None:
            self._hold_logits(asked.logit_L)
        keys = [str(self.served + row) for row in range(asked.rows)]
        gates = [
            None if asked.gates is None else {**asked.gates, "request_key": key} for key in keys
        ]
        arrival_T = self._arrivals(asked.seed * self.spec.rows, gates)
        if asked.gates is None:
            return Request(arrival_T, [])
        from fbs_rl.serving.client import take_traces

        traces = take_traces(self.llm, keys)
        return Request(arrival_T, [trace.first(len(arrival_T) - 1) for trace in traces])

    def _arrivals(self, seed: int, gates: Sequence[dict[str, Any] | None]) -> list[float]:
        """See Request. By tokens and not by steps: an engine may hand a step's tokens over in the next one."""
        given = [self._drawn(seed + row, options) for row, options in enumerate(gates)]
        start = time.perf_counter()
        count = {self._add(*prompt): 0 for prompt in given}
        arrival_T: list[float] = []
        while self.llm.llm_engine.has_unfinished_requests():
            outputs: Any = self.llm.llm_engine.step()
            now = time.perf_counter() - start
            for made in outputs:
                count[made.request_id] = len(made.outputs[0].token_ids)
            arrival_T += [now] * (min(count.values()) - len(arrival_T))
        return arrival_T

    def run(self, asked: RoundSpec) -> Round:
        if asked.share is not None:
            self._hold_logits(held_logits(self.config, asked.share, asked.apart))
        first = self.served
        for row in range(asked.rows):
            self._add(*self._drawn(row, self._gates_of_round(row, asked)))
        times = self._steps()
        # The first step is the prompts'; a last one may only tell that all is over.
        steps = times[1 : self.spec.new_tokens]
        wall_s, cpu_s = (statistics.median(part) for part in zip(*steps, strict=True))
        if asked.share is None:
            return Round(cpu_s, wall_s)
        return self._with_traces(cpu_s, wall_s, [str(i) for i in range(first, self.served)])

    def _gates_of_round(self, row: int, asked: RoundSpec) -> dict[str, Any] | None:
        if asked.share is None:
            return None
        sampled = asked.apart and asked.share > 0
        tau = 0.5 if asked.share else 1.0
        gates: dict[str, Any] = (
            {"gate_seed": row} if sampled else {"gates": "threshold", "tau": tau}
        )
        return {**gates, "request_key": str(self.served)}

    def _drawn(self, seed: int, gates: dict[str, Any] | None) -> tuple[list[int], Any]:
        """A random prompt, and what is asked of it."""
        from vllm import SamplingParams

        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.config.vocab_size, (self.spec.prompt_tokens,), generator=draw)
        params = SamplingParams(
            max_tokens=self.spec.new_tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=gates or {}
        )  # fmt: skip
        return ids.tolist(), params

    def _add(self, ids: list[int], params: Any) -> str:
        """The name of one request more."""
        name, engine = f"r{self.served}", self.llm.llm_engine
        engine.add_request(name, {"prompt_token_ids": ids}, params)
        self.served += 1
        return name

    def _steps(self) -> list[tuple[float, float]]:
        """(wall, CPU) seconds of every step until all requests are done."""
        times = []
        while self.llm.llm_engine.has_unfinished_requests():
            wall, cpu = time.perf_counter(), time.process_time()
            self.llm.llm_engine.step()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        return times

    def _hold_logits(self, logit_L: Sequence[float]) -> None:
        from fbs_rl.serving.client import update_gates

        tensors = {}
        for layer in self.config.gate_leaders:
            name = f"model.layers.{layer}.skip_gate.out"
            tensors[f"{name}.weight"] = torch.zeros(1, self.config.gate_hidden)
            decided = self.config.block_asked_at(layer).start
            tensors[f"{name}.bias"] = torch.tensor([logit_L[decided]])
        self.version += 1
        update_gates(self.llm, GateBundle.of(self.version, tensors))

    def _with_traces(self, cpu_s: float, wall_s: float, keys: Sequence[str]) -> Round:
        from fbs_rl.serving.client import take_traces

        traces = take_traces(self.llm, keys)
        costs = [trace.cost(self.config) for trace in traces]
        flops = sum(int(cost.flops_BT.sum()) for cost in costs)
        plain = sum(int(cost.backbone_flops_BT.sum()) for cost in costs)
        skip_TLB = torch.stack([torch.from_numpy(trace.skip_TL) for trace in traces], -1)
        closes_TB = torch.stack([torch.from_numpy(trace.closes_T) for trace in traces], -1)
        weights = [
            step_bytes(self.config, skip_LB, skip_LB.long(), True, 1, 0, closes_B=closes_B.long()).weights
            for skip_LB, closes_B in zip(skip_TLB, closes_TB, strict=True)
        ]  # fmt: skip
        skipped = float(skip_TLB.double().mean())
        return Round(cpu_s, wall_s, skipped, flops / plain, statistics.fmean(weights))


def held_logits(config: FBSConfig, share: float, apart: bool) -> list[float]:
    """Each layer's gate logit such that `share` of all layers is skipped.

    apart: one probability for all, to be sampled. Else layers spread evenly over those that may skip have a
    certain gate, the others a certain one that they run. Share 0: undecided gates, to be asked with τ = 1.
    """
    free = [i for i in range(config.layer_count) if i not in config.protected_layers]
    if share == 0:
        return [0.0] * config.layer_count
    if apart:
        prob = torch.tensor(min(share * config.layer_count / len(free), 0.99))
        return [float(torch.logit(prob))] * config.layer_count
    block = config.gate_block  # a block's first layer decides for all of it
    blocks = sorted({layer // block for layer in free})
    count = min(round(share * config.layer_count / block), len(blocks))
    chosen = {blocks[int((i + 0.5) * len(blocks) / count)] for i in range(count)}
    return [_CERTAIN if i // block in chosen else -_CERTAIN for i in range(config.layer_count)]
