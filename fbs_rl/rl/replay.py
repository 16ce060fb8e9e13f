"""Replay: rollouts' own actions through the parallel pass, for the probabilities that PPO takes gradients of.

A segment of N continuation tokens is replayed as its prompt and its first N − 1 tokens; the last one was never
fed. Rows are padded behind their end, where a causal model does not look, so no mask is needed. What comes
back holds gate columns only: column j of a row is that of its trace.

Shape letters: L layers, B rows, T fed tokens, C gate columns (rows are padded on the right).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.func import functional_call

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.rollout import SegmentRollout
from fbs_rl.types import FBSOutput, GateMode


@dataclass(frozen=True, slots=True)
class ReplayBatch:
    """Segments that run as one call. rows: their places in the list they were taken from.

    place_BC: position at which a column's token was fed, 0 on padding. skip_LBC: the actions.
    rollout_prob_LBC: the gate's p that the rollout engine reported. free_BC: columns at which gates acted, False
    on padding and on tokens that structure protected.
    """

    rows: tuple[int, ...]
    ids_BT: Tensor
    start_B: Tensor
    skip_LBT: Tensor
    place_BC: Tensor
    skip_LBC: Tensor
    rollout_prob_LBC: Tensor
    free_BC: Tensor

    @classmethod
    def of(cls, segments: Sequence[SegmentRollout], rows: Sequence[int]) -> ReplayBatch:
        """The batch of `segments[row]` for each of `rows`, on the CPU."""
        chosen = [segments[row] for row in rows]
        layers = chosen[0].trace.skip_TL.shape[1]
        columns = [len(s.trace.skip_TL) for s in chosen]
        width, length = max(columns), max(fed_tokens(s) for s in chosen)
        batch = cls(
            rows=tuple(rows),
            ids_BT=torch.zeros(len(rows), length, dtype=torch.long),
            start_B=torch.tensor([len(s.prompt_ids) for s in chosen]),
            skip_LBT=torch.zeros(layers, len(rows), length, dtype=torch.bool),
            place_BC=torch.zeros(len(rows), width, dtype=torch.long),
            skip_LBC=torch.zeros(layers, len(rows), width, dtype=torch.bool),
            rollout_prob_LBC=torch.zeros(layers, len(rows), width),
            free_BC=torch.zeros(len(rows), width, dtype=torch.bool),
        )
        for row, (segment, count) in enumerate(zip(chosen, columns, strict=True)):
            trace, start = segment.trace, len(segment.prompt_ids)
            ids = (*segment.prompt_ids, *segment.token_ids[:-1])
            skip_LC = torch.from_numpy(trace.skip_TL.T.copy())
            batch.ids_BT[row, : len(ids)] = torch.tensor(ids)
            batch.skip_LBT[:, row, start : len(ids)] = skip_LC
            batch.place_BC[row, :count] = torch.arange(start, len(ids))
            batch.skip_LBC[:, row, :count] = skip_LC
            batch.rollout_prob_LBC[:, row, :count] = torch.from_numpy(trace.prob_TL.T.copy())
            batch.free_BC[row, :count] = torch.from_numpy(trace.protected_T == 0)
        return batch

    def to(self, device: torch.device) -> ReplayBatch:
        tensors = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "rows"
        }
        return replace(self, **tensors)

    def columns(self, values: Sequence[Tensor]) -> Tensor:
        """[..., B, C] of one tensor [..., its columns] for each row, with 0 on padding."""
        leading = values[0].shape[:-1]
        padded = values[0].new_zeros(*leading, *self.free_BC.shape).to(self.free_BC.device)
        for row, value in enumerate(values):
            padded[..., row, : value.shape[-1]] = value
        return padded


@dataclass(frozen=True, slots=True)
class Replayed:
    """prob_LBC: the gate's p, float32, 0 where none acts. state_BCd: the state asked for, entering its layer."""

    prob_LBC: Tensor
    state_BCd: Tensor | None = None


def fed_tokens(segment: SegmentRollout) -> int:
    """Prompt and continuation without its last token."""
    return len(segment.prompt_ids) + len(segment.token_ids) - 1


def check_segment(segment: SegmentRollout, config: FBSConfig) -> None:
    """Raise ValueError for a trace that is not one of this model, or that does not start behind the prompt."""
    trace = segment.trace
    if trace.skip_TL.shape[1] != config.layer_count:
        raise ValueError(
            f"the trace {trace.key!r} has {trace.skip_TL.shape[1]} layers and this model "
            f"{config.layer_count}; replay rollouts of the same model"
        )
    if trace.decode_start != len(segment.prompt_ids):
        raise ValueError(
            f"the trace {trace.key!r} starts at token {trace.decode_start} of a prompt of "
            f"{len(segment.prompt_ids)}; gates of rollouts start behind the prompt"
        )


def batches_by_length(length: Mapping[int, int], most: int) -> list[list[int]]:
    """Rows in batches of at most `most` tokens, padding included; a longer row is a batch of its own.

    length: tokens of each row. Longest first, and equal ones in the order of their numbers.
    """
    batches: list[list[int]] = []
    for row in sorted(length, key=lambda row: (-length[row], row)):
        last = batches[-1] if batches else None
        if last and (len(last) + 1) * length[last[0]] <= most:  # its first row is its longest
            last.append(row)
        else:
            batches.append([row])
    return batches


def cut_batches(
    segments: Sequence[SegmentRollout], rows: Sequence[int], micro_tokens: int
) -> list[ReplayBatch]:
    """`rows` in batches of at most micro_tokens, padding included, neighbours in length together.

    A segment longer than that is a batch of its own; segments without a column are left out: nothing was decided.
    """
    fed = {row: fed_tokens(segments[row]) for row in rows if len(segments[row].trace.skip_TL)}
    batches = batches_by_length(fed, micro_tokens)
    return [ReplayBatch.of(segments, batch) for batch in batches]


def replay(
    model: FBSForCausalLM,
    batch: ReplayBatch,
    never_skip: Sequence[int] = (),
    tensors: Mapping[str, Tensor] | None = None,
    state_layer: int | None = None,
) -> Replayed:
    """p of every gate column under the rollout's actions, with gradient to the parameters that ask for one.

    never_skip: layers that always ran, beyond the model's. tensors: values to use instead of the parameters of
    these names (a reference gate). state_layer: also return the state that enters this layer.
    Raises ValueError for actions that this model could not have taken.
    """
    arguments = {
        "input_ids": batch.ids_BT,
        "gates": GateMode.REPLAY,
        "skip": batch.skip_LBT,
        "decode_start": batch.start_B,
        "never_skip": tuple(never_skip),
        "with_logits": False,
        "output_hidden_states": state_layer is not None,
    }
    out: FBSOutput = (
        model(**arguments)
        if tensors is None
        else functional_call(model, dict(tensors), kwargs=arguments)
    )
    assert out.gate_prob is not None
    place_LBC = batch.place_BC.expand_as(batch.skip_LBC)
    state_BCd = None
    if state_layer is not None:
        assert out.hidden_states is not None
        state_BTd = out.hidden_states[state_layer]
        state_BCd = state_BTd.gather(
            1, batch.place_BC.unsqueeze(-1).expand(-1, -1, state_BTd.shape[-1])
        )
    return Replayed(out.gate_prob.gather(2, place_LBC), state_BCd)
