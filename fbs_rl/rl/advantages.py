"""Advantages: what each gate column is credited with, less what was to be expected (SPEC 8.3, 8.5).

A row is one segment of one rollout. Segments are separate passes behind the same dense prompt, so no gate
bears on another segment and no credit crosses from one to the other. The columns of a row share one
advantage over layers.

Shape letters: R rows of a batch, T gate columns (rows are padded on the right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fbs_rl.rl.reward import SegmentKind

_SMALLEST_STD = 1e-9
"""Below it, returns differ by rounding only: they are sums of float32 NLLs times λ/M."""


class Credit(StrEnum):
    """Which rewards a column's return G adds up."""

    WINDOW = "window"  # its own share and the next ones, `window_tokens` in all
    TO_GO = "to_go"  # all shares from its own to the segment's end
    EPISODE = "episode"  # R, the same for every column


class Baseline(StrEnum):
    """What is subtracted from G."""

    LEAVE_ONE_OUT = "leave_one_out"  # mean of the other rollouts of the same prompt, same column
    GROUP = "group"  # mean of all rollouts of the prompt, then divided by their std (as GRPO)
    BATCH = "batch"  # one mean over the batch
    CRITIC = "critic"  # V, by generalised advantage estimation


class Scale(StrEnum):
    """What all advantages of a batch are divided by; their mean stays. GROUP has its own."""

    BATCH_STD = "batch_std"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageSettings:
    credit: Credit = Credit.WINDOW
    window_tokens: int = 8
    """Columns that a return reaches over with credit `window`; 1 is the own share alone."""
    baseline: Baseline = Baseline.LEAVE_ONE_OUT
    scale: Scale = Scale.BATCH_STD
    gae_lambda: float = 0.95
    """Of the critic baseline."""
    gamma: float = 1.0
    """Discount per column, of the critic baseline; other returns are not discounted."""

    def __post_init__(self) -> None:
        if self.window_tokens < 1:
            raise ValueError(
                f"window_tokens is {self.window_tokens}; give 1 or more, or credit to_go for the whole rest"
            )
        for name in ("gae_lambda", "gamma"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
        if self.baseline is Baseline.CRITIC and self.credit is Credit.WINDOW:
            raise ValueError(
                "the critic baseline weighs later rewards by gae_lambda and takes no window; "
                "set credit to to_go (shares) or episode (R at the last column)"
            )


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment of one rollout.

    prompt: what makes rollouts comparable, such as the question's id. reward_T: shares of the columns.
    episode_reward: R, for credit `episode`. value_T: V at each column when the rollout was made (critic).
    bootstrap: V of the state behind the last column if the row was cut off there, 0 if it ended: a row
    whose shares add up to its whole part of R has ended.
    """

    prompt: str
    kind: SegmentKind
    reward_T: Tensor
    episode_reward: float
    value_T: Tensor | None = None
    bootstrap: float = 0.0

    def __post_init__(self) -> None:
        if self.reward_T.ndim != 1:
            raise ValueError(f"rewards of a row need shape [T], got {tuple(self.reward_T.shape)}")
        if self.value_T is not None and self.value_T.shape != self.reward_T.shape:
            raise ValueError(
                f"a row has {len(self.reward_T)} columns and values of shape {tuple(self.value_T.shape)}"
            )


@dataclass(frozen=True, slots=True)
class Advantages:
    """advantage: per row [T], float64. divisor: per row, what its advantages were divided by.

    Whatever else is to be on the advantages' scale, such as the analytic compute gradient, is divided by the
    same. value_target: per row [T], G^λ = A + V before the division (critic only, else empty).
    """

    advantage: tuple[Tensor, ...]
    divisor: tuple[float, ...]
    value_target: tuple[Tensor, ...] = ()


def compute_advantages(rows: Sequence[SegmentRow], settings: AdvantageSettings) -> Advantages:
    """The advantages of a whole batch; rows may have no column.

    Raises ValueError where a baseline has nothing to stand on: a prompt with one rollout, a row without values.
    """
    if not rows:
        raise ValueError("there are no rows to compute advantages of; give at least one rollout")
    lengths = [len(row.reward_T) for row in rows]
    reward_RT = pad_sequence([row.reward_T.double() for row in rows], batch_first=True)
    columns = torch.arange(reward_RT.shape[1], device=reward_RT.device)
    valid_RT = columns < torch.tensor(lengths, device=reward_RT.device).unsqueeze(1)
    divisor_R = torch.ones(len(rows), dtype=torch.float64, device=reward_RT.device)
    target_RT = None
    if settings.baseline is Baseline.CRITIC:
        advantage_RT, target_RT = _against_critic(rows, reward_RT, valid_RT, settings)
    else:
        return_RT, known_RT = _returns(rows, reward_RT, valid_RT, settings)
        advantage_RT = return_RT - return_RT[known_RT].mean()
        if settings.baseline is not Baseline.BATCH:
            for members in _groups(rows, settings.baseline):
                mean, spread = _group_statistics(
                    return_RT[members], known_RT[members], settings.baseline
                )
                advantage_RT[members] = return_RT[members] - mean
                divisor_R[members] = spread
    if settings.scale is Scale.BATCH_STD and settings.baseline is not Baseline.GROUP:
        divisor_R *= _spread(advantage_RT[valid_RT])
    advantage_RT = advantage_RT / divisor_R.unsqueeze(1)
    return Advantages(
        advantage=_unpadded(advantage_RT, lengths),
        divisor=tuple(divisor_R.tolist()),
        value_target=() if target_RT is None else _unpadded(target_RT, lengths),
    )


def windowed_returns(reward_RT: Tensor, window: int) -> Tensor:
    """G_t = Σ r_{t'} over t' = t .. t + window − 1, as far as the row goes."""
    length = reward_RT.shape[1]
    before_RT = F.pad(reward_RT.cumsum(1), (1, 0))  # [R, T + 1]: what came before each column
    ends = (torch.arange(length, device=reward_RT.device) + window).clamp_max(length)
    return before_RT[:, ends] - before_RT[:, :length]


def leave_one_out(return_RT: Tensor, known_RT: Tensor) -> Tensor:
    """Per column, the mean over the other rollouts that reach it, all rollouts of one prompt: [R, T].

    It takes nothing from its own row but the row's length, which is known before the column decides, so it
    leaves the policy gradient unbiased. A column that no other rollout reaches takes the mean over all columns
    of the others, and 0 if they have none. Where few others reach it, it is noisier: with one other, the
    advantage's variance is at most twice that of G.
    """
    held_RT = torch.where(known_RT, return_RT, 0.0)
    others_RT = known_RT.sum(0) - known_RT.long()
    mean_RT = (held_RT.sum(0) - held_RT) / others_RT.clamp_min(1)
    sum_R, count_R = held_RT.sum(1), known_RT.sum(1)
    elsewhere_R = (sum_R.sum() - sum_R) / (count_R.sum() - count_R).clamp_min(1)
    return torch.where(others_RT > 0, mean_RT, elsewhere_R.unsqueeze(1))


def generalised_advantages(
    reward_RT: Tensor,
    value_RT: Tensor,
    valid_RT: Tensor,
    bootstrap_R: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γV_{t+1} − V_t (Schulman et al. 2016, eq 16); 0 on padding.

    bootstrap_R: V behind the last column of each row; 0 where the row ended there.
    """
    advantage_RT = torch.zeros_like(reward_RT)
    running_R, next_R = torch.zeros_like(bootstrap_R), bootstrap_R
    for t in reversed(range(reward_RT.shape[1])):
        delta_R = reward_RT[:, t] + gamma * next_R - value_RT[:, t]
        stepped_R = delta_R + gamma * gae_lambda * running_R
        running_R = torch.where(valid_RT[:, t], stepped_R, running_R)
        next_R = torch.where(valid_RT[:, t], value_RT[:, t], next_R)
        advantage_RT[:, t] = torch.where(valid_RT[:, t], running_R, 0.0)
    return advantage_RT


def _returns(
    rows: Sequence[SegmentRow], reward_RT: Tensor, valid_RT: Tensor, settings: AdvantageSettings
) -> tuple[Tensor, Tensor]:
    """G [R, T], and where it is known to baselines: R is, beyond a row's end too."""
    if settings.credit is Credit.EPISODE:
        total_R = reward_RT.new_tensor([row.episode_reward for row in rows])
        return total_R.unsqueeze(1).expand_as(reward_RT).clone(), torch.ones_like(valid_RT)
    longest = max(reward_RT.shape[1], 1)
    window = settings.window_tokens if settings.credit is Credit.WINDOW else longest
    return windowed_returns(reward_RT, window), valid_RT


def _groups(rows: Sequence[SegmentRow], baseline: Baseline) -> list[list[int]]:
    """Indices of the rows that are compared: the same prompt and the same kind of segment."""
    groups: dict[tuple[str, SegmentKind], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.prompt, row.kind), []).append(index)
    for (prompt, kind), members in groups.items():
        if len(members) == 1:
            raise ValueError(
                f"the baseline {baseline!s} compares rollouts, and prompt {prompt!r} has one {kind!s} "
                f"segment; sample each prompt twice or more, or take the baseline batch or critic"
            )
    return list(groups.values())


def _group_statistics(
    return_RT: Tensor, known_RT: Tensor, baseline: Baseline
) -> tuple[Tensor, float]:
    """The baseline of a group's rows, and what their advantages are divided by."""
    if baseline is Baseline.LEAVE_ONE_OUT:
        return leave_one_out(return_RT, known_RT), 1.0
    held_RT = torch.where(known_RT, return_RT, 0.0)
    mean_T = held_RT.sum(0) / known_RT.sum(0).clamp_min(1)
    return mean_T, _spread((return_RT - mean_T)[known_RT])


def _against_critic(
    rows: Sequence[SegmentRow], reward_RT: Tensor, valid_RT: Tensor, settings: AdvantageSettings
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets. With credit `episode`, R is paid at the last column of each segment."""
    values = [row.value_T for row in rows if row.value_T is not None]
    if len(values) < len(rows):
        raise ValueError(
            f"the critic baseline needs values of all {len(rows)} rows, got {len(values)}; give value_T"
        )
    value_RT = pad_sequence([value_T.detach().double() for value_T in values], batch_first=True)
    if settings.credit is Credit.EPISODE:
        reward_RT = torch.zeros_like(reward_RT)
        for index, row in enumerate(rows):
            if len(row.reward_T):
                reward_RT[index, len(row.reward_T) - 1] = row.episode_reward
    bootstrap_R = reward_RT.new_tensor([row.bootstrap for row in rows])
    advantage_RT = generalised_advantages(
        reward_RT, value_RT, valid_RT, bootstrap_R, settings.gamma, settings.gae_lambda
    )
    return advantage_RT, advantage_RT + value_RT


def _spread(values: Tensor) -> float:
    """Standard deviation (population); 1 where there is none to speak of, so that nothing is blown up."""
    if values.numel() < 2:
        return 1.0
    std = float(values.std(correction=0))
    return std if std > _SMALLEST_STD else 1.0


def _unpadded(padded_RT: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(row[:length] for row, length in zip(padded_RT, lengths, strict=True))
