"""What `python -m fbs_rl.bench latency` puts side by side: ways of decoding, each with one prefill and forced steps.

Letters: B rows, T tokens, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fbs_rl.bench_engine import held_logits
from fbs_rl.decode.cuda_launcher import Launcher
from fbs_rl.decode.graph_decoder import GraphDecoder, RowsDecide
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.types import GateMode


@dataclass(frozen=True, slots=True)
class Workload:
    """One request: `rows` prompts of prompt_tokens, then new_tokens forced steps."""

    rows: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of decoding. mode: of the gates. share: of layers to skip, None: by tau alone.

    engine: "transformers", "incremental" (the model's own cached pass), "graph" (the graph decoder), "vllm"
    (stock) or "vllm-fbs" (with the plugin). modules: with PAW, Chunk-Head and gates; without them the model is
    the plain backbone.
    """

    name: str
    engine: str
    modules: bool
    mode: GateMode = GateMode.DENSE
    share: float | None = None
    tau: float | None = None


@dataclass(frozen=True, slots=True)
class StepTrace:
    """skip_LBT: what was skipped, None for an engine that cannot skip. closed_chunks_BT, opens_BT: of count_trace."""

    skip_LBT: Tensor | None = None
    closed_chunks_BT: Tensor | None = None
    opens_BT: Tensor | None = None


class Engine(Protocol):
    """config: of the model that runs; counts what a step costs."""

    config: FBSConfig

    def prefill(self, prompt_BT: Tensor, forced_BT: Tensor) -> None: ...

    def step(self, index: int) -> None:
        """Feed forced token `index`; may return before the device is done."""
        ...

    def logits(self) -> Tensor:
        """[B, V], of the last step."""
        ...

    def trace(self) -> StepTrace: ...


@runtime_checkable
class OwnClock(Protocol):
    """An engine that nobody can drive step by step: it runs whole requests and times them itself."""

    config: FBSConfig

    def request_ms(self) -> list[float]:
        """Milliseconds of a request's prefill, and of each of its steps."""
        ...

    def trace(self) -> StepTrace:
        """Of the last request."""
        ...


def make_engine(
    variant: Variant, model: FBSForCausalLM, plain: Any, load: Workload, launcher: Launcher | None
) -> Engine:
    """The engine of a variant. model: with modules, or without where the variant has none. plain: the backbone."""
    if variant.engine == "transformers":
        return _Transformers(plain, model.config)
    prepare = _gate_holder(model, variant)
    if variant.engine == "incremental":
        return _Incremental(model, variant, prepare)
    return _Graph(model, variant, load, prepare, launcher)


def _gate_holder(model: FBSForCausalLM, variant: Variant) -> Callable[[], None]:
    """What makes the model's gates give the variant's share; variants may share a model, so each asks again."""
    logit_L = logits_of_share(model.config, variant)
    return (lambda: None) if logit_L is None else lambda: hold_gates(model, logit_L)


def logits_of_share(config: FBSConfig, variant: Variant) -> list[float] | None:
    """What each layer's gate must answer for the variant's share; None: what it answers by itself."""
    if variant.mode is GateMode.DENSE or variant.share is None:
        return None
    if variant.mode is GateMode.SAMPLE and not variant.share:
        # Drawn, and never above the noise but once in 400.
        return [-50.0] * config.layer_count
    return held_logits(config, variant.share, variant.mode is GateMode.SAMPLE)


@torch.no_grad()
def hold_gates(model: FBSForCausalLM, logit_L: list[float]) -> None:
    """Make every gate answer its layer's logit; all of it is still computed."""
    for layer in model.model.fbs_layers():
        if layer.skip_gate is not None:
            layer.skip_gate.out.weight.zero_()
            decided = model.config.block_asked_at(layer.index).start
            layer.skip_gate.out.bias.fill_(logit_L[decided])


def bar_of(variant: Variant) -> float | None:
    """The variant's τ. Held gates answer far from one half; share 0 is a bar that nothing reaches."""
    if variant.share is None:
        return variant.tau
    return 0.5 if variant.share else 1.0


class _Transformers:
    def __init__(self, backbone: Any, config: FBSConfig) -> None:
        self.backbone, self.config = backbone, config

    def prefill(self, prompt_BT: Tensor, forced_BT: Tensor) -> None:
        self.forced_BT = forced_BT
        out = self.backbone(prompt_BT, use_cache=True, logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits

    def step(self, index: int) -> None:
        token_B1 = self.forced_BT[:, index : index + 1]
        self.last = self.backbone(token_B1, past_key_values=self.cache, use_cache=True).logits

    def logits(self) -> Tensor:
        return self.last[:, -1]

    def trace(self) -> StepTrace:
        return StepTrace()


class _Incremental:
    def __init__(self, model: FBSForCausalLM, variant: Variant, prepare: Callable[[], None]) -> None:  # fmt: skip
        self.model, self.variant, self.prepare, self.config = model, variant, prepare, model.config

    def prefill(self, prompt_BT: Tensor, forced_BT: Tensor) -> None:
        self.prepare()
        self.forced_BT, self.cache = forced_BT, FBSCache(self.config.layer_count)
        self.gates: dict[str, Any] = {"gates": self.variant.mode}
        if self.variant.mode is GateMode.THRESHOLD:
            self.gates["tau"] = bar_of(self.variant)
        if self.variant.mode is GateMode.SAMPLE:
            self.gates["gate_seed"] = 0
        self.skips: list[Tensor] = []
        self.closed: list[Tensor] = []
        self._feed(prompt_BT, logits_to_keep=1)
        self.skips.clear()

    def _feed(self, ids: Tensor, **more: Any) -> None:
        out = self.model(ids, past_key_values=self.cache, **self.gates, **more)
        assert out.logits is not None and out.skip is not None
        self.last = out.logits
        self.skips.append(out.skip)
        if self.cache.chunks is not None:
            self.closed.append(self.cache.chunks.closed_B.clone())

    def step(self, index: int) -> None:
        self._feed(self.forced_BT[:, index : index + 1])

    def logits(self) -> Tensor:
        return self.last[:, -1]

    def trace(self) -> StepTrace:
        skip_LBT = torch.cat(self.skips, 2).cpu()
        if not self.closed:
            return StepTrace(skip_LBT)
        closed_BT = torch.stack(self.closed, 1).cpu()
        return StepTrace(skip_LBT, closed_BT[:, :-1], closed_BT.diff() > 0)


class _Graph:
    def __init__(
        self, model: FBSForCausalLM, variant: Variant, load: Workload, prepare: Callable[[], None],
        launcher: Launcher | None,
    ) -> None:  # fmt: skip
        together = load.rows > 1 and variant.mode is GateMode.THRESHOLD
        prepare()  # the decoder keeps copies of gates, so nobody's holding them later reaches it
        self.decoder = GraphDecoder(
            model, load.rows, load.prompt_tokens + load.new_tokens, gates=variant.mode,
            rows_decide=RowsDecide.TOGETHER if together else RowsDecide.ALONE, prompt_lengths=(load.prompt_tokens,),
            launcher=launcher,
        )  # fmt: skip
        self.variant, self.config = variant, model.config

    def prefill(self, prompt_BT: Tensor, forced_BT: Tensor) -> None:
        seed = 0 if self.variant.mode is GateMode.SAMPLE else None
        self.decoder.prefill(prompt_BT, tau=bar_of(self.variant), gate_seed=seed)
        self.decoder.force(forced_BT)

    def step(self, index: int) -> None:
        self.decoder.step()

    def logits(self) -> Tensor:
        return self.decoder.logits_BV

    def trace(self) -> StepTrace:
        made = self.decoder.trace()
        return StepTrace(made.skip_LBT, made.closed_chunks_BT, made.opens_BT)
