"""One sequence under hard skipping: its cache, what was fed after the prompt, and what the model then knew.

Shape letters: L layers, P layers with a preview, d hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.types import GateMode, GateRequest


@dataclass(slots=True)
class Reading:
    """What the model knows once a token was fed.

    log_prob_V: of the next token, float64. state_d, earlier_d: final states (before the last norm) of the
    token and of the one before it (the same one where there is none). window_P: ŵ at the layers with a
    preview.
    """

    log_prob_V: Tensor
    state_d: Tensor
    earlier_d: Tensor
    window_P: Tensor

    @property
    def entropy(self) -> float:
        """H of the next token's distribution, in nats."""
        return float(torch.special.entr(self.log_prob_V.exp()).sum())


@dataclass(slots=True)
class GatedSequence:
    """A prompt, read densely, and the tokens fed after it, each with the layers that it skipped.

    closed: chunks closed after the prompt and after each fed token; None without a Chunk-Head.
    """

    model: FBSForCausalLM
    never_skip: frozenset[int]
    prompt_tokens: int
    cache: FBSCache
    reading: Reading
    closed: list[int] | None
    fed: list[int] = field(default_factory=list)
    skips: list[Tensor] = field(default_factory=list)

    @classmethod
    @torch.inference_mode()
    def after_prompt(
        cls, model: FBSForCausalLM, prompt_ids: Sequence[int], never_skip: Sequence[int] = ()
    ) -> GatedSequence:
        """The sequence before its first token. never_skip: as in the model's forward."""
        cache = FBSCache(model.config.layer_count)
        extra, count = frozenset(never_skip), len(prompt_ids)
        request = _request(model, GateMode.DENSE, count, extra)
        reading, _, _ = _run(model, prompt_ids, request, cache, None)
        closed = None if cache.chunks is None else [int(cache.chunks.closed_B)]
        return cls(model, extra, count, cache, reading, closed)

    @torch.inference_mode()
    def branch(self) -> GatedSequence:
        """A copy that can be fed while this one stays as it is.

        The cache is copied whole, since it cannot be shortened: about a fifteenth of a step's time for
        SmolLM2-135M on a CPU.
        """
        closed = None if self.closed is None else list(self.closed)
        return GatedSequence(
            self.model,
            self.never_skip,
            self.prompt_tokens,
            copy.deepcopy(self.cache),
            self.reading,
            closed,
            list(self.fed),
            list(self.skips),
        )

    @torch.inference_mode()
    def feed(self, token: int, skip_L: Tensor) -> None:
        """Run one step with these actions (bool).

        Raises ValueError if they name a layer that never skips.
        """
        skip_L11 = skip_L.to(self.model.device).view(-1, 1, 1)
        request = _request(
            self.model, GateMode.REPLAY, self.prompt_tokens, self.never_skip, skip=skip_L11
        )
        self.reading, _, executed_L = _run(
            self.model, [token], request, self.cache, self.reading.state_d
        )
        self.fed.append(token)
        self.skips.append(executed_L)
        if self.closed is not None:
            assert self.cache.chunks is not None
            self.closed.append(int(self.cache.chunks.closed_B))

    @torch.inference_mode()
    def own_decision(
        self, token: int, mode: GateMode, tau: float | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(z [L] bool, p [L]) of the model's own gates if `token` were fed now; nothing is fed.

        A step on a copy of the cache, because each gate reads what the layers below it left. Decisions are
        functions of their input, so feeding z afterwards repeats the step exactly. tau: None takes the
        configuration's. seed: of mode sample.
        """
        request = _request(self.model, mode, self.prompt_tokens, self.never_skip, tau, seed)
        cache = copy.deepcopy(self.cache)
        _, prob_L, skip_L = _run(self.model, [token], request, cache, self.reading.state_d)
        return skip_L, prob_L


def _request(
    model: FBSForCausalLM, mode: GateMode, prompt_tokens: int, never_skip: frozenset[int],
    tau: float | None = None, seed: int = 0, skip: Tensor | None = None,
) -> GateRequest:  # fmt: skip
    device = model.device
    return GateRequest(
        mode,
        torch.tensor([model.config.tau if tau is None else tau], device=device),
        torch.tensor([prompt_tokens], device=device),
        seed_B=torch.tensor([seed], device=device),
        skip_LBT=skip,
        never_skip=never_skip,
    )


def _run(
    model: FBSForCausalLM, ids: Sequence[int], request: GateRequest, cache: FBSCache, before_d: Tensor | None
) -> tuple[Reading, Tensor, Tensor]:  # fmt: skip
    """(reading, p [L], z [L]) of the last token. before_d: final state of the token before these."""
    ids_1T = torch.tensor([list(ids)], device=model.device)
    # Below the forward of FBSForCausalLM, which does not hand out the final state of a cached step.
    result = model.model.run(ids_1T, request, cache=cache)
    norm: Any = model.model.norm
    logits_V = model.lm_head(norm(result.state_BTd[0, -1]))
    states = result.state_BTd[0, -2:].float().cpu()
    earlier_d = states[0] if before_d is None else before_d
    windows = [preview.window_BT[0, -1] for preview in result.taps.previews]
    window_P = torch.stack(windows).float().cpu() if windows else torch.zeros(0)
    reading = Reading(logits_V.double().log_softmax(-1).cpu(), states[-1], earlier_d, window_P)
    return reading, result.prob_LBT[:, 0, -1].float().cpu(), result.skip_LBT[:, 0, -1].cpu()
