"""The practitioner's toy: skip fixed layers where a one-layer classifier expects an easy next token.

Easy means that the dense model, after reading the token, is sure of the one that follows (low entropy).
The classifier reads the final states of the tokens before, so it costs next to nothing and is not counted.

Shape letters: N columns of the training traces, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.agents import FixedAgent, decode_env
from envs.decode_env import Action, DecodeEnv
from envs.observation import Observation
from envs.settings import PolicyCost

_PRIOR = 0.1
"""Deviation of a weight: a few questions have about as many columns as there are features."""
_STEPS = 200


def column_features(before: Observation | None, now: Observation) -> Tensor:
    """[F] features of a column. before: observation of the column before, None at the start of a phase."""
    earlier = now if before is None else before
    parts = (now["state"], earlier["state"], now["entropy"], now["token_nll"], now["motion"])
    return torch.from_numpy(np.concatenate(parts))


@dataclass(frozen=True, slots=True)
class EntropyClassifier:
    """P(entropy after this token <= limit) = σ(w·(x − mean)/scale + b). limit: in nats."""

    weight_F: Tensor
    bias: float
    mean_F: Tensor
    scale_F: Tensor
    limit: float

    @classmethod
    def fit(cls, features_NF: Tensor, entropy_N: Tensor, easy_frac: float) -> EntropyClassifier:
        """Logistic regression with a normal prior on the weights; the limit makes `easy_frac` of the columns easy.

        Raises ValueError unless there are both easy and hard columns.
        """
        limit = float(entropy_N.quantile(easy_frac))
        easy_N = (entropy_N <= limit).float()
        if len(easy_N) < 2 or bool((easy_N == easy_N[0]).all()):
            raise ValueError(
                f"{len(easy_N)} columns with {int(easy_N.sum())} easy ones teach no difference; "
                f"give more questions or another easy_frac"
            )
        mean_F, scale_F = features_NF.mean(0), features_NF.std(0).clamp_min(1e-6)
        unit_NF = (features_NF - mean_F) / scale_F
        weight = torch.zeros(features_NF.shape[1] + 1, requires_grad=True)
        search = torch.optim.LBFGS([weight], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            logit_N = unit_NF @ weight[:-1] + weight[-1]
            total = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, easy_N)
            total = total + weight[:-1].square().sum() / (2 * _PRIOR**2 * len(easy_N))
            total.backward()
            return total

        search.step(loss)  # pyright: ignore[reportArgumentType]
        found = weight.detach()
        return cls(found[:-1], float(found[-1]), mean_F, scale_F, limit)

    def probability(self, features: Tensor) -> Tensor:
        """Of being easy; features [..., F]."""
        unit = (features - self.mean_F) / self.scale_F
        return torch.sigmoid(unit @ self.weight_F + self.bias)


@dataclass(slots=True)
class EntropyAgent:
    """Skips `skipped_L` where the classifier says easy with at least `cut`."""

    name: str
    classifier: EntropyClassifier
    skipped_L: Action
    cut: float = 0.5
    policy_cost: PolicyCost = PolicyCost.NONE
    _before: Observation | None = field(default=None, repr=False)
    _phase: tuple[Any, ...] = ()

    @classmethod
    def fit(
        cls,
        env: DecodeEnv,
        questions: Sequence[int],
        layers: Sequence[int],
        easy_frac: float = 0.5,
        name: str = "entropy",
    ) -> EntropyAgent:
        """An agent that skips `layers`, fitted on the dense episodes of these questions (indices)."""
        features_NF, entropy_N = dense_columns(env, questions)
        classifier = EntropyClassifier.fit(features_NF, entropy_N, easy_frac)
        return cls(name, classifier, FixedAgent.skipping(env, layers).skipped_L)

    def act(self, observation: Observation, info: dict[str, Any]) -> Action:
        phase = (info["question"], info["phase"])
        new = info["column"] == 0 or phase != self._phase
        features_F = column_features(None if new else self._before, observation)
        self._before, self._phase = observation, phase
        easy = float(self.classifier.probability(features_F)) >= self.cut
        return self.skipped_L.copy() if easy else np.zeros_like(self.skipped_L)


def dense_columns(env: DecodeEnv, questions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(features [N, F], entropy after the column's token [N]) of dense episodes.

    The decode phase's last column is left out: the observation after it is the prompt's again.
    """
    inner, never = decode_env(env), FixedAgent.never(env)
    features, entropies = [], []
    for index in questions:
        now, info = inner.reset(options={"question": index, "token_seed": 0})
        before: Observation | None = None
        terminated = False
        while not terminated:
            following, _, terminated, _, after = inner.step(never.act(now, info))
            same = after["phase"] == info["phase"]
            if same:
                features.append(column_features(before, now))
                entropies.append(float(following["entropy"][0]))
            before = now if same else None
            now, info = following, after
    if not features:
        raise ValueError("these questions have no column that another follows; give longer ones")
    return torch.stack(features), torch.tensor(entropies)
