"""Rollouts without a rollout engine: gates drawn from the bounded policy through the parallel pass itself.

A decision at layer l depends on actions at layers below l alone, of its own token and of earlier ones. So if
drawn actions are replayed and drawn again, layer l is settled after l + 1 rounds, whatever they began with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fbs_rl.gate_trace import GateTrace
from fbs_rl.model.flops import closed_chunks
from fbs_rl.model.skip_gate import gate_uniform
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.reward import Sampler, SegmentKind
from fbs_rl.rl.rollout import EpisodeRollout, SegmentRollout, gate_seed
from fbs_rl.seeds import stable_hash
from fbs_rl.types import FBSOutput
from tests.tiny import VOCAB


@dataclass(frozen=True)
class Question:
    """dense_ids: a continuation drawn from the dense pass at temperature 1."""

    name: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    dense_ids: tuple[int, ...] = ()


@torch.no_grad()
def make_questions(model: Any, count: int, tokens: int = 10, answer: int = 3) -> list[Question]:
    """Questions of uneven length, with continuations of `tokens` and about `answer` tokens."""
    made = []
    for index in range(count):
        draw = torch.Generator().manual_seed(100 + index)
        prompt = torch.randint(0, VOCAB, (4 + index % 3,), generator=draw).tolist()
        answer_ids = torch.randint(0, VOCAB, (answer + index % 2,), generator=draw).tolist()
        ids = list(prompt)
        for _ in range(tokens):
            prob_V = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(prob_V, 1, generator=draw)))
        made.append(
            Question(f"q{index}", tuple(prompt), tuple(answer_ids), tuple(ids[len(prompt) :]))
        )
    return made


def make_episodes(
    model: Any,
    questions: Sequence[Question],
    samples: int,
    step: int = 0,
    policy: GatePolicy | None = None,
    never_skip: Sequence[int] = (),
    protected: float = 0.0,
) -> list[EpisodeRollout]:
    """`samples` episodes of each question. protected: share of tokens that structure protects."""
    policy = policy or GatePolicy()
    wanted = [
        (q, sample, kind, ids)
        for q in questions
        for sample in range(samples)
        for kind, ids in ((SegmentKind.SELF, q.dense_ids), (SegmentKind.GOLD, q.answer_ids))
        if ids
    ]
    seeds = [stable_hash("rollout", step, q.name, sample) for q, sample, _, _ in wanted]
    rows = [([*q.prompt_ids], [*ids]) for q, _, _, ids in wanted]
    segments = _segments(
        model,
        rows,
        [kind for _, _, kind, _ in wanted],
        [gate_seed(seed, kind) for seed, (_, _, kind, _) in zip(seeds, wanted, strict=True)],
        policy,
        never_skip,
        protected,
    )
    episodes: dict[tuple[str, int], EpisodeRollout] = {}
    for (q, sample, _, _), seed, segment in zip(wanted, seeds, segments, strict=True):
        before = episodes.get((q.name, sample))
        held = () if before is None else before.segments
        episodes[q.name, sample] = EpisodeRollout(q.name, sample, seed, step, (*held, segment))
    return list(episodes.values())


@dataclass(frozen=True)
class _Rows:
    """Prompts with continuations, padded on the right. columns_BT: tokens whose gates act or are protected."""

    ids_BT: Tensor
    start_B: Tensor
    mask_BT: Tensor
    columns_BT: Tensor
    place_BT: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[list[int], list[int]]]) -> _Rows:
        whole = [torch.tensor(prompt + ids) for prompt, ids in rows]
        ids_BT = pad_sequence(whole, batch_first=True)
        length_B1 = torch.tensor([len(ids) for ids in whole]).unsqueeze(1)
        start_B = torch.tensor([len(prompt) for prompt, _ in rows])
        place_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        # The last token is scored, not fed: its gates do not exist.
        columns_BT = (place_BT >= start_B.unsqueeze(1)) & (place_BT < length_B1 - 1)
        return cls(ids_BT, start_B, place_BT < length_B1, columns_BT, place_BT)


def _drawn(
    model: Any, rows: _Rows, seeds: list[int], policy: GatePolicy, never_skip: Sequence[int], acts_BT: Tensor
) -> FBSOutput:  # fmt: skip
    """The pass under actions that its own probabilities draw; `skip` holds them."""
    config = model.config
    layer_L11 = torch.arange(config.layer_count).view(-1, 1, 1)
    leader_L11 = layer_L11 - layer_L11 % config.gate_block
    noise_LBT = policy.noise(gate_uniform(torch.tensor(seeds), rows.place_BT, leader_L11))
    free_L11 = torch.ones(config.layer_count, 1, 1, dtype=torch.bool)
    free_L11[sorted(config.forced_layers(never_skip))] = False
    skip_LBT = torch.zeros_like(free_L11 & acts_BT)
    for _ in range(config.layer_count + 1):
        out = model(
            rows.ids_BT, rows.mask_BT, gates="replay", skip=skip_LBT, decode_start=rows.start_B,
            never_skip=tuple(never_skip),
        )  # fmt: skip
        again_LBT = (noise_LBT < out.gate_prob) & free_L11 & acts_BT
        if torch.equal(again_LBT, skip_LBT):
            return out
        skip_LBT = again_LBT
    raise AssertionError("actions of later layers changed those of earlier ones")


@torch.no_grad()
def _segments(
    model: Any,
    pairs: list[tuple[list[int], list[int]]],
    kinds: list[SegmentKind],
    seeds: list[int],
    policy: GatePolicy,
    never_skip: Sequence[int],
    protected: float,
) -> list[SegmentRollout]:
    rows = _Rows.of(pairs)
    draw = torch.Generator().manual_seed(seeds[0] % 2**31)
    protected_BT = rows.columns_BT & (torch.rand(rows.ids_BT.shape, generator=draw) < protected)
    out = _drawn(model, rows, seeds, policy, never_skip, rows.columns_BT & ~protected_BT)
    dense = model(rows.ids_BT, rows.mask_BT, gates="dense")
    nll = [_nll(each.logits, rows.ids_BT) for each in (out, dense)]
    made = []
    for row, ((prompt, ids), kind) in enumerate(zip(pairs, kinds, strict=True)):
        scored = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
        gated_N, dense_N = (nll_BT[row, scored].numpy() for nll_BT in nll)
        sampler = Sampler.GIVEN if kind is SegmentKind.GOLD else Sampler.DENSE
        trace = _trace(out, row, len(prompt), len(ids) - 1, protected_BT)
        made.append(SegmentRollout(kind, sampler, tuple(prompt), tuple(ids), gated_N, dense_N, trace))  # fmt: skip
    return made


def _trace(out: FBSOutput, row: int, start: int, columns: int, protected_BT: Tensor) -> GateTrace:
    assert out.skip is not None and out.gate_prob is not None and out.taps is not None
    fed = slice(start, start + columns)
    closes_T, chunks_T = np.zeros(columns, bool), np.zeros(columns, np.int32)
    if out.taps.chunks is not None:
        opens_BT = out.taps.chunks.opens_BT
        closes_T = opens_BT[row, fed].numpy()
        chunks_T = closed_chunks(opens_BT)[row, fed].numpy().astype(np.int32)
    return GateTrace(
        key=f"row {row}",
        prompt_tokens=start,
        decode_start=start,
        finished=True,
        skip_TL=out.skip[:, row, fed].T.numpy().copy(),
        prob_TL=out.gate_prob[:, row, fed].T.numpy().copy(),
        version_T=np.zeros(columns, np.int32),
        protected_T=protected_BT[row, fed].numpy().astype(np.uint8),
        closes_T=closes_T,
        chunks_T=chunks_T,
        replayed_tokens=0,
    )


def _nll(logits_BTV: Tensor | None, ids_BT: Tensor) -> Tensor:
    """NLL [B, T − 1] of every next token, float64."""
    assert logits_BTV is not None
    logp_BTV = logits_BTV[:, :-1].double().log_softmax(-1)
    return -logp_BTV.gather(2, ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1)
