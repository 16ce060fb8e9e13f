"""The PPO learner: episodes in, better gates out. No cluster: actors/ppo_learner.py puts it into one.

Every rank is given all episodes and credits all of them; what is shared out is the replays. Sums are added over
ranks here, gradients by the weights, so all ranks take the same step and hold the same weights.

Shape letters: L layers, B rows, C gate columns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fbs_rl.gate_bundle import GateBundle
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.collapse import CollapseGuard
from fbs_rl.rl.credit import credit_segments, score_episode
from fbs_rl.rl.critic import ValueHead, explained_variance
from fbs_rl.rl.gate_views import see, view_bytes
from fbs_rl.rl.learner_settings import LearnerSettings, MismatchLimits, Trains
from fbs_rl.rl.mismatch import Mismatch, MismatchSums
from fbs_rl.rl.ppo_loss import LossInputs, log_probability, ppo_loss
from fbs_rl.rl.ranks import Ranks
from fbs_rl.rl.replay import check_segment, replay
from fbs_rl.rl.rollout import EpisodeRollout
from fbs_rl.rl.trainable import MasterWeights, frozen_digest, set_trainable
from fbs_rl.rl.update_batches import (
    Call,
    Minibatch,
    UpdateSegments,
    cut_calls,
    draw_minibatches,
    share_of,
    shuffled,
)
from fbs_rl.rl.update_metrics import (
    LossSums,
    ProbabilitySums,
    mismatch_metrics,
    reward_metrics,
    trace_metrics,
)
from fbs_rl.rl.update_plan import UpdatePlan, plan_update
from fbs_rl.seeds import stable_hash


@dataclass(frozen=True, slots=True)
class _Before:
    """What an update knows before its first step. prob_by_layer: mean p of layers that decide. values: V of every
    segment's columns, if there is a critic.
    """

    metrics: dict[str, Any]
    prob_by_layer: dict[int, float]
    values: list[Tensor] | None = None


class PPOLearner:
    """Trains the gates of `model` in place. seed: of the order of minibatches and of the value head.

    weights: what keeps and moves what trains; where ranks are several, one that adds their gradients up.

    The reference of the KL term is the gates as they are now; frozen: digest of everything that does not train.
    """

    def __init__(
        self,
        model: FBSForCausalLM,
        settings: LearnerSettings,
        seed: int,
        ranks: Ranks | None = None,
        weights: type[MasterWeights] = MasterWeights,
    ) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.ranks = ranks or Ranks()
        self.device = model.model.embed_tokens.weight.device
        self.trained = set_trainable(model, settings.trains)
        self.value_head = self._make_value_head() if settings.has_critic else None
        named = dict(self.trained)
        if self.value_head is not None:
            named |= self.value_head.named_parameters("value")
        self.weights = weights(named, settings)
        self.guard = CollapseGuard(settings.collapse)
        self.counters = {"updates": 0, "optimizer_steps": 0, "bad_steps": 0}
        self.frozen = self.digest_frozen()
        self.load_reference()

    def _make_value_head(self) -> ValueHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash("value head", self.seed))
            return ValueHead(self.model.config.hidden_size).to(self.device)

    def load_reference(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Let the KL term pull towards `tensors` from now on; None: towards the gates as they are."""
        source = self.trained if tensors is None else tensors
        if source.keys() != self.trained.keys():
            odd = sorted(source.keys() ^ self.trained.keys())
            raise ValueError(
                f"the reference differs in {len(odd)} tensors from what trains, {odd[0]} first; "
                f"give the bundle of a model with the same options and the same `trains`"
            )
        self.reference = {
            name: source[name].detach().to(p.device, p.dtype, copy=True)
            for name, p in self.trained.items()
        }

    def plan(self, step: int) -> UpdatePlan:
        """How update `step` is drawn and trained; its rollouts must use the policy and never_skip of it."""
        return plan_update(step, self.settings, self.model.config)

    # --- self-test ----------------------------------------------------------------------------------

    def self_test(
        self, episodes: Sequence[EpisodeRollout], limits: MismatchLimits, step: int = 0
    ) -> Mismatch:
        """How far these rollouts' gates, drawn as update `step` says, lie from the learner's own.

        Raises MismatchError, in one sentence, beyond `limits`, and ValueError for too few gate columns.
        """
        plan, found = self.plan(step), UpdateSegments.of(episodes)
        for segment in found.segments:
            check_segment(segment, self.model.config)
        rows = [row for row, columns in enumerate(found.columns) if columns]
        calls = cut_calls(found, rows, self.settings.micro_tokens, self.model.config, plan)
        sums = MismatchSums(self.device)
        for part in self._share([calls]):
            for call in part.calls:
                with torch.no_grad():
                    prob_LBC = replay(self.model, call.batch, plan.never_skip).prob_LBC
                self._compare(sums, call, prob_LBC, found, plan)
        mismatch = sums.total(self.ranks)
        mismatch.check(limits)
        return mismatch

    def _compare(
        self,
        sums: MismatchSums,
        call: Call,
        prob_LBC: Tensor,
        found: UpdateSegments,
        plan: UpdatePlan,
    ) -> None:
        uniform_LBC = call.uniform(found.seeds, self.model.config.gate_block)
        batch = call.batch
        sums.add(
            call.decides_LBC, batch.skip_LBC, batch.rollout_prob_LBC, prob_LBC, uniform_LBC, plan.policy
        )  # fmt: skip

    def _share(self, minibatches: list[list[Call]]) -> list[Minibatch]:
        ratio = self.settings.loss.ratio
        return share_of(minibatches, self.ranks.rank, self.ranks.count, ratio, self.device)

    # --- an update ------------------------------------------------------------------------------------

    def update(self, episodes: Sequence[EpisodeRollout], step: int) -> dict[str, Any]:
        """Train on the episodes of update `step` (0-based); its figures, equal on all ranks.

        Raises ValueError for episodes that cannot be credited or replayed, CollapseError after the update that
        found the gates collapsed.
        """
        settings, config, plan = self.settings, self.model.config, self.plan(step)
        found = UpdateSegments.of(episodes)
        scored = [score_episode(episode, config, settings.reward) for episode in episodes]
        minibatches = self._share(draw_minibatches(found, settings, config, plan, self.seed))
        before = self._look_before(minibatches, found, plan)
        credits = credit_segments(scored, config, settings, plan.never_skip, before.values)
        for minibatch in minibatches:
            for call in minibatch.calls:
                call.take_credit(credits)
        metrics = {
            **reward_metrics(scored),
            **trace_metrics(scored, plan.deciding),
            **before.metrics,
            **self._train(minibatches, plan),
        }
        if before.values is not None:
            targets = [c.target_T for c in credits if c.target_T is not None]
            explained = explained_variance(torch.cat(before.values), torch.cat(targets))
            metrics["value/explained_var"] = explained
        self.counters["updates"] += 1
        self.guard.check(before.prob_by_layer, metrics["ppo/kl_ref"])
        return metrics

    @torch.no_grad()
    def _look_before(
        self, minibatches: Sequence[Minibatch], found: UpdateSegments, plan: UpdatePlan
    ) -> _Before:
        """Look at every call before the first step, and give it its old probabilities and its reference."""
        mismatch = MismatchSums(self.device)
        probabilities = ProbabilitySums(self.model.config.layer_count, self.device)
        values = [torch.zeros(columns, device=self.device) for columns in found.columns]
        calls = [call for minibatch in minibatches for call in minibatch.calls]
        keeps_views = self._keeps_views(calls)
        for call in calls:
            batch = call.batch
            if keeps_views:
                call.views = see(self.model, batch, plan.never_skip, self._state_layer)
            prob_LBC, call.value_BC = self._replay(call, plan)
            reference_LBC = self._probabilities(call, plan, self.reference)
            policy_LBC = plan.policy.probability(prob_LBC)
            call.inputs = LossInputs(
                prob_LBT=prob_LBC,
                skip_LBT=batch.skip_LBC,
                old_logp_LBT=log_probability(policy_LBC, batch.skip_LBC),
                decides_LBT=call.decides_LBC,
                advantage_BT=torch.zeros_like(prob_LBC[0]),
                reference_LBT=reference_LBC,
            )
            self._compare(mismatch, call, prob_LBC, found, plan)
            probabilities.add(prob_LBC, call.decides_LBC)
            if call.value_BC is not None:
                for row, value_C in zip(batch.rows, call.value_BC, strict=True):
                    values[row] = value_C[: found.columns[row]]
        prob_by_layer, histogram = probabilities.means(self.ranks)
        metrics = {
            **mismatch_metrics(mismatch.total(self.ranks)),
            **{f"gate/prob_layer_{layer}": prob for layer, prob in prob_by_layer.items()},
            "gate/prob_histogram": histogram,
        }
        if self.value_head is None:
            return _Before(metrics, prob_by_layer)
        everyones = self.ranks.sum(torch.cat(values)).cpu()
        return _Before(metrics, prob_by_layer, list(everyones.split(found.columns)))

    @property
    def _state_layer(self) -> int | None:
        """The layer whose state the value head reads; None without one."""
        if self.value_head is None:
            return None
        config = self.model.config
        boundary = config.boundary_layer
        return min(2, config.layer_count // 4) if boundary is None else boundary

    def _keeps_views(self, calls: Sequence[Call]) -> bool:
        """Whether gates alone train and what they read in these calls is not too much to keep."""
        columns = sum(call.batch.place_BC.numel() for call in calls)
        number_bytes = self.model.model.embed_tokens.weight.element_size()
        held = view_bytes(self.model.config, columns, number_bytes)
        most = self.settings.runtime.gate_views_gib * 2**30
        return self.settings.trains is Trains.GATES and held <= most

    def _replay(self, call: Call, plan: UpdatePlan) -> tuple[Tensor, Tensor | None]:
        """(p [L, B, C], V [B, C] if there is a critic) under the weights as they are."""
        if call.views is not None:
            prob_LBC, state_BCd = self._probabilities(call, plan), call.views.state_BCd
        else:
            now = replay(self.model, call.batch, plan.never_skip, state_layer=self._state_layer)
            prob_LBC, state_BCd = now.prob_LBC, now.state_BCd
        if self.value_head is None:
            return prob_LBC, None
        assert state_BCd is not None
        return prob_LBC, self.value_head(state_BCd)

    def _probabilities(
        self, call: Call, plan: UpdatePlan, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """p [L, B, C] of the gates, or of a reference."""
        if call.views is not None:
            return call.views.probabilities(self.model, plan.never_skip, tensors)
        return replay(self.model, call.batch, plan.never_skip, tensors).prob_LBC

    def _train(self, minibatches: Sequence[Minibatch], plan: UpdatePlan) -> dict[str, Any]:
        """Epochs of optimizer steps, and their figures."""
        settings = self.settings
        self.weights.set_rates(plan.lr_scale)
        epochs: list[dict[str, float]] = []
        norms: list[float] = []
        for epoch in range(settings.epochs):
            sums = LossSums(self.device)
            key = stable_hash("epoch", self.seed, plan.step, epoch)
            for index in shuffled(len(minibatches), key):
                norms.append(self._take_step(minibatches[index], plan, sums))
                sums.steps += 1
            epochs.append(sums.means(self.ranks))
            limit = settings.target_kl
            if limit is not None and epochs[-1]["ppo/approx_kl"] > limit:
                break
        finite = [norm for norm in norms if math.isfinite(norm)]
        self.counters["optimizer_steps"] += len(finite)
        self.counters["bad_steps"] += len(norms) - len(finite)
        metrics = {name: sum(e[name] for e in epochs) / len(epochs) for name in epochs[0]}
        metrics["ppo/ratio_max"] = max(e["ppo/ratio_max"] for e in epochs)
        if self.value_head is None:
            del metrics["value/loss"]
        return {
            **metrics,
            "ppo/epochs": len(epochs),
            "ppo/temperature": plan.policy.temperature,
            "ppo/entropy_scale": plan.entropy_scale,
            "train/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "train/lr": plan.lr_scale * settings.lr_gates,
            "train/optimizer_steps": len(finite),
            "train/bad_steps": len(norms) - len(finite),
            "train/decisions": sum(minibatch.counts.decisions for minibatch in minibatches),
        }

    def _take_step(self, minibatch: Minibatch, plan: UpdatePlan, sums: LossSums) -> float:
        """One optimizer step; the gradient's norm before clipping, not finite where the step was not applied."""
        self.weights.clear_gradients()
        for call in minibatch.calls:
            assert call.inputs is not None
            prob_LBC, value_BC = self._replay(call, plan)
            inputs = replace(call.inputs, prob_LBT=prob_LBC, counts=minibatch.counts)
            if inputs.values is not None and value_BC is not None:
                inputs = replace(inputs, values=replace(inputs.values, value_BT=value_BC))
            out = ppo_loss(inputs, self.settings.loss, plan.policy, plan.entropy_scale)
            out.loss.backward()
            self.weights.take_gradients()
            sums.add(out.metrics)
        return self.weights.step(self.settings.grad_clip)

    # --- what leaves and comes back -----------------------------------------------------------------------

    def bundle(self, version: int) -> GateBundle:
        """A copy of what trains, as the model holds it, for rollout engines."""
        return GateBundle.of(version, self.trained)

    def digest_frozen(self) -> str:
        """Digest of all parameters and buffers that do not train; equal to `frozen` for as long as none moved."""
        return frozen_digest(self.model, self.trained)

    def check_frozen(self) -> None:
        """Raise RuntimeError if anything changed that PPO does not train."""
        if self.digest_frozen() != self.frozen:
            raise RuntimeError(
                f"tensors changed that trains={self.settings.trains!s} leaves alone: something else wrote to this model"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a learner made anew on the same model folder needs to go on to the bit."""
        return {
            "weights": copy.deepcopy(self.weights.state_dict()),
            "reference": {name: t.clone() for name, t in self.reference.items()},
            "counters": dict(self.counters),
            "outside": dict(self.guard.outside),
            "frozen": self.frozen,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises ValueError for that of another backbone, seed or choice of parameters."""
        if state["frozen"] != self.frozen:
            raise ValueError(
                "the saved learner belongs to another backbone; start it from the folder that its run started from"
            )
        if state["seed"] != self.seed:
            raise ValueError(
                f"the saved learner had seed {state['seed']}, not {self.seed}; go on with the same"
            )
        self.weights.load_state_dict(state["weights"])
        self.load_reference(state["reference"])
        self.counters = dict(state["counters"])
        self.guard.outside = dict(state["outside"])
