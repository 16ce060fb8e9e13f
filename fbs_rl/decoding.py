"""A decode loop for one sequence that keeps the trace: what was skipped at each token, and what it cost.

Shape letters: L layers, T tokens that were fed (one fewer than were made), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbs_rl.decode.safety import StructureGuard
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import count_trace
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.types import GateMode

Chooser = Callable[[Tensor], int]
"""The next token, from its logits [V]."""
OnToken = Callable[[int, int | None], None]
"""Called with each token and the layers it skipped (None: it was not fed)."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What one decoding did, batch 1.

    skip_LT (bool), gate_prob_LT: column j is what happened when token j was fed. The last token is never
    fed, so T = len(token_ids) - 1. closed_chunks_T, opens_T: as count_trace reads them; None without a
    Chunk-Head. stop: "eos" (the token that ends the text is among token_ids) or "length".
    """

    mode: GateMode
    prompt_tokens: int
    token_ids: list[int]
    skip_LT: Tensor
    gate_prob_LT: Tensor
    closed_chunks_T: Tensor | None
    opens_T: Tensor | None
    prefill_s: float
    decode_s: float
    kv_cache_bytes: int
    stop: str

    @property
    def skipped_by_token(self) -> list[int | None]:
        """Layers that each token skipped; None for the last."""
        return [*self.skip_LT.sum(0).tolist(), None]


@torch.inference_mode()
def decode(
    model: FBSForCausalLM,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    choose: Chooser,
    end_ids: frozenset[int] = frozenset(),
    on_token: OnToken | None = None,
    *,
    mode: GateMode,
    guard: StructureGuard | None = None,
    **gate_arguments: Any,
) -> Generation:
    """Feed the prompt at once, then one token at a time. gate_arguments: of forward (tau, gate_seed, never_skip).

    guard: of one row; the steps that it protects run every layer. on_token is called after a token was fed,
    and for the last one; the time it takes is not counted.
    """
    cache = FBSCache(model.config.layer_count)
    tokens: list[int] = []
    skip, prob, closed, seconds = [], [], [], []
    feed = list(prompt_ids)
    while True:
        start = time.perf_counter()
        if guard is not None and tokens:
            gate_arguments["decode_start"] = protecting_start(cache, guard.push(feed))
        ids = torch.tensor([feed], device=model.device)
        out = model(ids, past_key_values=cache, gates=mode, logits_to_keep=1, **gate_arguments)
        chosen = choose(out.logits[0, -1])  # reads a number back: the device has finished by then
        seconds.append(time.perf_counter() - start)
        if tokens:
            skip.append(out.skip[:, 0, 0].cpu())
            prob.append(out.gate_prob[:, 0, 0].float().cpu())
            if on_token is not None:
                on_token(tokens[-1], int(skip[-1].sum()))
        if cache.chunks is not None:
            closed.append(cache.chunks.closed_B.cpu())
        tokens.append(chosen)
        feed = [chosen]
        if chosen in end_ids or len(tokens) == max_new_tokens:
            break
    if on_token is not None:
        on_token(tokens[-1], None)
    closed_T = torch.cat(closed) if closed else None
    nothing_LT = torch.zeros(model.config.layer_count, 0)
    return Generation(
        mode=mode,
        prompt_tokens=len(prompt_ids),
        token_ids=tokens,
        skip_LT=torch.stack(skip, 1) if skip else nothing_LT.bool(),
        gate_prob_LT=torch.stack(prob, 1) if prob else nothing_LT,
        closed_chunks_T=None if closed_T is None else closed_T[:-1],
        opens_T=None if closed_T is None else closed_T.diff() > 0,
        prefill_s=seconds[0],
        decode_s=sum(seconds[1:]),
        kv_cache_bytes=cache.bytes(),
        stop="eos" if tokens[-1] in end_ids else "length",
    )


def protecting_start(cache: FBSCache, protects_B: Sequence[bool]) -> Tensor:
    """decode_start [B] for the next step, one token a row, in which the rows marked here skip nothing.

    For them gates begin at the token after. Raises ValueError for a cache whose prompt was not read with
    the forward's own decode_start (None).
    """
    if cache.position_B is None or cache.decode_start_B is None:
        raise ValueError(
            "protecting a step needs a cache that holds the prompt; feed it first, with decode_start=None"
        )
    protects = torch.tensor(protects_B, device=cache.position_B.device)
    return torch.where(protects, cache.position_B + 1, cache.decode_start_B)


def token_chooser(temperature: float, top_p: float, seed: int) -> Chooser:
    """How tokens follow from logits: the best one at temperature 0, else seeded draws from the top_p."""
    draw = torch.Generator().manual_seed(seed)

    def best(logits_V: Tensor) -> int:
        return int(logits_V.argmax())

    def sampled(logits_V: Tensor) -> int:
        prob_V, order_V = (logits_V.float().cpu() / temperature).softmax(-1).sort(descending=True)
        outside_V = prob_V.cumsum(-1) - prob_V >= top_p  # the smallest set that reaches top_p stays
        rank = torch.multinomial(prob_V.masked_fill(outside_V, 0.0), 1, generator=draw)
        return int(order_V[rank])

    return best if temperature == 0 else sampled


def end_token_ids(model: FBSForCausalLM, fallback: int | None) -> frozenset[int]:
    """Tokens that end a text: as generate() has them, or `fallback` where the model names none."""
    settings = model.generation_config
    named = None if settings is None else settings.eos_token_id
    named = fallback if named is None else named
    if named is None:
        return frozenset()
    return frozenset(named if isinstance(named, list) else [named])


def measures(config: FBSConfig, made: Generation) -> dict[str, Any]:
    """The numbers of a run, ready for JSON. Shares and rates are None where no token was fed."""
    steps, acting = made.skip_LT.shape[1], made.gate_prob_LT[made.gate_prob_LT > 0]
    numbers: dict[str, Any] = {
        "mode": str(made.mode),
        "token_ids": made.token_ids,
        "stop": made.stop,
        "steps": steps,
        "skip_ratio": None,
        "skip_share_by_layer": None,
        "skipped_by_token": made.skipped_by_token,
        "skip_trace": made.skip_LT.T.int().tolist(),
        "gate_prob_range": [float(acting.min()), float(acting.max())] if len(acting) else None,
        "flops": None,
        "prefill_s": made.prefill_s,
        "decode_s": made.decode_s,
        "tokens_per_s": None,
        "kv_cache_bytes": made.kv_cache_bytes,
    }
    if steps:
        chunks = (
            None if x is None else x.unsqueeze(0) for x in (made.closed_chunks_T, made.opens_T)
        )
        start_B = torch.tensor([made.prompt_tokens])
        gates_on = made.mode is not GateMode.DENSE
        cost = count_trace(config, made.skip_LT.unsqueeze(1), start_B, gates_on, *chunks)
        numbers["skip_ratio"] = cost.skip_ratio
        numbers["skip_share_by_layer"] = made.skip_LT.float().mean(1).tolist()
        numbers["tokens_per_s"] = steps / made.decode_s
        numbers["flops"] = {
            "executed": int(cost.flops_BT.sum()),
            "dense": int(cost.dense_flops_BT.sum()),
            "executed_frac": cost.executed_frac,
            "eq4": cost.paper_ratio,
        }
    return numbers


def comparison(run: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Two runs' measures beside each other.

    first_difference: index of the first token that differs, None if none does. speedup: of tokens per
    second, None where a run fed nothing.
    """
    ours, theirs = run["token_ids"], dense["token_ids"]
    pairs = enumerate(zip(ours, theirs, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    timed = run["tokens_per_s"] and dense["tokens_per_s"]
    return {
        "first_difference": None if ours == theirs else shared,
        "speedup": run["tokens_per_s"] / dense["tokens_per_s"] if timed else None,
    }
