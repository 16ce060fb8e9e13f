"""vLLM's model runner and worker with FBS requests: plans before each step, traces after it, calls from outside.

The runner's own code is not touched: its class is exchanged for one with a few methods more, which works for
its CPU and its CUDA form alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fbs_rl.gate_bundle import GateBundle, GateParts, digest_of, gate_tensors, held_digest
from fbs_rl.serving.sessions import Scheduled, Sessions


class FBSRunnerMixin:
    """In front of a GPUModelRunner (vLLM's first generation, which the CPU's derives from)."""

    fbs: Sessions
    _states: dict[int, Any]

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        runner: Any = self
        if not hasattr(runner, "fbs"):
            runner.fbs = _sessions(runner)
        runner.fbs.finish(list(scheduler_output.finished_req_ids))
        parent: Any = super()
        return parent.execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called once for each real step, right around the model; profiling runs call the model itself."""
        runner: Any = self
        turn, parent = runner.get_model().model.turn, super()
        runner.fbs.settle(wait=False)
        turn.plan = runner.fbs.plan(_scheduled(runner))
        try:
            out = parent._model_forward(*args, **kwargs)  # pyright: ignore
            runner.fbs.keep(turn.report)
            return out
        finally:
            turn.plan = turn.report = None

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        runner, parent = self, super()
        runner._states = _states_to_keep(runner)
        return parent._sample(*args, **kwargs)  # pyright: ignore

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """After a piece of a prompt, vLLM takes back what was drawn by a way that a CPU's generators do not have."""
        runner, parent = self, super()
        generators: Any = runner.input_batch.generators  # pyright: ignore
        hidden = {index: generators.pop(index) for index in runner._states}
        try:
            return parent._bookkeeping_sync(*args, **kwargs)  # pyright: ignore
        finally:
            for index, generator in hidden.items():
                generators[index] = generator.set_state(runner._states[index])


def _states_to_keep(runner: Any) -> dict[int, Any]:
    """The generators, as they are, of requests whose sampled token will be thrown away; of CPUs only."""
    if runner.device.type != "cpu":
        return {}
    thrown = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
    generators = runner.input_batch.generators
    return {index: generators[index].get_state() for index in thrown if index in generators}


def _sessions(runner: Any) -> Sessions:
    model = runner.get_model().model
    return Sessions(model.config, model.settings, runner.device, _decoder(runner.vllm_config))


def _scheduled(runner: Any) -> list[Scheduled]:
    """The step as the runner has laid it out."""
    batch = runner.input_batch
    starts = runner.query_start_loc.np
    found = []
    for index, request_id in enumerate(batch.req_ids):
        first = int(batch.num_computed_tokens_cpu[index])
        count = int(starts[index + 1] - starts[index])
        prompt = int(batch.num_prompt_tokens[index])
        ids = batch.token_ids_cpu[index]
        request = runner.requests[request_id]
        tokens = ids[first : first + count].tolist()
        if tokens[-1] < 0 and runner.fbs.reads_tokens(request_id):
            tokens[-1] = _drawn(batch, request_id)
        found.append(
            Scheduled(
                request_id,
                first,
                tokens,
                ids[:prompt],
                request.sampling_params.extra_args,
            )
        )
    return found


def _drawn(batch: Any, request_id: str) -> int:
    """The token that the step in front drew, if vLLM has not asked for it yet; waits for it."""
    return int(batch.prev_sampled_token_ids[batch.prev_req_id_to_index[request_id], 0])


def _decoder(vllm_config: Any) -> Callable[[list[int]], str] | None:
    """Text of token ids; None where the engine was told to have no tokenizer."""
    config = vllm_config.model_config
    if config.skip_tokenizer_init:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer, revision=config.tokenizer_revision, trust_remote_code=config.trust_remote_code
    )  # fmt: skip
    return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class FBSWorkerExtension:
    """What `collective_rpc` can ask of an engine's worker. Arguments and results are str, int, bytes and lists.

    Calls run between steps, so an update is never seen by half a step.
    """

    model_runner: Any

    def fbs_take_traces(self, keys: list[str] | None = None) -> list[dict[str, Any]]:
        """Traces of these request keys (None: all finished ones) in wire form; taken once."""
        sessions = self._fbs_sessions()
        return sessions.take(keys)

    def fbs_update_gates(self, packed: bytes) -> dict[str, Any]:
        """Put a GateBundle into the running model; its version and digest as this worker has them now."""
        bundle = GateBundle.unpack(bytes(packed))
        sessions = self._fbs_sessions()
        if bundle.version < sessions.version:
            raise ValueError(
                f"gate version {bundle.version} is older than {sessions.version}, which this engine has; "
                f"give updates rising versions"
            )
        self.model_runner.get_model().apply_gates(bundle)
        sessions.version = bundle.version
        if sessions.stats is not None:
            sessions.stats.add(gate_updates=1)
            sessions.stats.set(gate_version=bundle.version)
        return {"version": bundle.version, "digest": held_digest(self._fbs_named(), bundle)}

    def fbs_gates(self, parts: str = "gates") -> dict[str, Any]:
        """Version, and digest over the gates (or gates and previews), as they are in memory."""
        names = list(gate_tensors(self.model_runner.get_model(), GateParts(parts)))
        return {"version": self._fbs_sessions().version, "digest": self._fbs_digest(names)}

    def fbs_memory(self) -> dict[str, int]:
        """Bytes of traces, and traces dropped because nobody fetched them."""
        traces = self._fbs_sessions().traces
        return {"trace_bytes": traces.bytes, "traces_dropped": traces.dropped}

    def _fbs_digest(self, names: list[str]) -> str:
        named = self._fbs_named()
        return digest_of({name: named[name] for name in names})

    def _fbs_named(self) -> dict[str, Any]:
        model = self.model_runner.get_model()
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def _fbs_sessions(self) -> Sessions:
        runner = self.model_runner
        if not hasattr(runner, "fbs"):
            runner.fbs = _sessions(runner)
        return runner.fbs


def with_sessions(runner: Any) -> None:
    """Make `runner` one that knows FBS requests."""
    plain = type(runner)
    runner.__class__ = type(f"FBS{plain.__name__}", (FBSRunnerMixin, plain), {})
