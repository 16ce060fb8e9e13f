"""One trial of a study: gates from a start, trained by PPO with one seed, measured before, during and after.

Learner, plan of questions, rewards and draws are those of fbs_rl.ppo; episodes come from ParallelRollouts of the very
model that learns, so nothing is sent anywhere. Whoever writes the continuations that are trained on, held-out ones are
the dense model's greedy ones, so that trials compare; what the gated model writes itself is measured beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fbs_rl.checkpoint import added_tensors
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.collapse import CollapseError
from fbs_rl.rl.credit import score_episode
from fbs_rl.rl.episode_figures import threshold_like
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.heldout_points import Point, measure_point, own_dense
from fbs_rl.rl.learner import PPOLearner
from fbs_rl.rl.own_text import OwnText, own_ratios
from fbs_rl.rl.paired_bootstrap import paired_difference
from fbs_rl.rl.parallel_pass import drawn_gates, threshold_gates
from fbs_rl.rl.parallel_rollouts import ParallelRollouts
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.rl.reward import Sampler
from fbs_rl.rl.rollout import RolloutSettings, RolloutTask
from fbs_rl.rl.rollout_plan import RolloutPlan
from fbs_rl.rl.skip_curves import Bench, Curve, at_skip
from fbs_rl.rl.study_table import Emit, reference_of
from fbs_rl.rl.update_plan import plan_update

Say = Callable[[str], None]
_COMPARED = ("dnll_gold", "dnll_self", "reward")
_LOGGED = (
    "reward/total", "reward/compute_term", "reward/quality_term", "reward/nll_increase", "gate/skip_rate",
    "gate/executed_flops_frac", "ppo/approx_kl", "ppo/kl_ref", "ppo/entropy", "ppo/clip_frac", "ppo/epochs",
    "ppo/temperature", "train/grad_norm", "train/bad_steps", "train/decisions", "mismatch/logp_max", "mismatch/kl",
    "mismatch/flip_rate", "value/explained_var",
)  # fmt: skip


@dataclass(slots=True)
class Trial:
    """One configuration and seed. tuning: tasks that the policy's own threshold is set on. scoring: those it is
    measured on.

    start: what FBS added to the model, as it was before any trial. every: updates between two looks at held-out
    questions. emit: is given every row.
    """

    name: str
    settings: PPOSettings
    plan: RolloutPlan
    rollouts: ParallelRollouts
    bench: Bench
    tuning: list[RolloutTask]
    scoring: list[RolloutTask]
    start: Mapping[str, Tensor]
    end_ids: tuple[int, ...]
    every: int
    emit: Emit
    say: Say

    @property
    def model(self) -> FBSForCausalLM:
        return self.rollouts.model

    def run(self) -> None:
        """Measure the start, train, measure again, compare."""
        restore(self.model, self.start)
        self.rollouts.forget_dense()
        last = self.settings.steps - 1
        self.look("no-RL", 0, self.policy(0))
        self.calibrated("no-RL", 0, last)
        before = self.curves("no-RL", 0, moved=False)
        own = self.own_texts("no-RL", 0, before["no-RL"], {})
        done = self.train()
        self.calibrated("PPO", done, last)
        after = self.curves("PPO", done, self.dense_moves)
        self.own_texts("PPO", done, after["PPO"], own)
        self.compare(before | after, done)

    @property
    def dense_moves(self) -> bool:
        return not self.settings.learner.dense_is_fixed

    def policy(self, step: int) -> GatePolicy:
        return plan_update(step, self.settings.learner, self.model.config).policy

    # --- training -------------------------------------------------------------------------------------

    def train(self) -> int:
        """All updates; how many there were before the gates collapsed, if they did."""
        learner = PPOLearner(self.model, self.settings.learner, self.settings.seed)
        done = 0
        for step in range(self.settings.steps):
            try:
                record = self.update(learner, step)
            except CollapseError as error:
                reason = str(error)
                self.emit({**self.base(step + 1), "kind": "stopped", "reason": reason})
                self.say(f"{self.name} seed {self.settings.seed}: {reason}")
                done = step + 1
                break
            done = step + 1
            self.emit({**self.base(done), "kind": "update", **record})
            self.say(self.line(done, record))
            if done % self.every == 0 or done == self.settings.steps:
                self.look("PPO", done, self.policy(step))
        learner.check_frozen()
        return done

    def update(self, learner: PPOLearner, step: int) -> dict[str, Any]:
        """Rollouts, rewards, one update."""
        began = time.monotonic()
        drawn = plan_update(step, self.settings.learner, self.model.config)
        tasks = [task for chunk in self.plan.chunks(step) for task in chunk]
        rollout = self.settings.episodes.rollout(
            drawn.policy, self.end_ids, never_skip=drawn.never_skip
        )
        episodes = self.rollouts.roll(tasks, rollout)
        rolled = time.monotonic()
        metrics = learner.update(episodes, step)
        self.rollouts.version = step + 1
        if self.dense_moves:
            self.rollouts.forget_dense()
        learned = time.monotonic()
        found = {name: metrics[name] for name in _LOGGED if name in metrics}
        return {**found, "rollout_s": rolled - began, "learn_s": learned - rolled}

    # --- measuring ------------------------------------------------------------------------------------

    def look(self, arm: str, step: int, policy: GatePolicy) -> None:
        """Held-out questions at the model's own threshold, and drawn from the policy as it is."""
        tau = self.model.config.tau
        self.report(arm, step, self.point(tau, "tau of the start"))
        self.report(f"{arm} drawn", step, self.drawn(policy, f"policy, T {policy.temperature:g}"))

    def calibrated(self, arm: str, step: int, last: int) -> None:
        """The threshold that skips on tuning questions as often as the last update's policy, and that policy."""
        policy = self.policy(last)
        episodes = self.rollouts.roll(
            self.tuning, self.heldout_rollout(policy, self.model.config.tau)
        )
        reward, config = self.settings.learner.reward, self.model.config
        tau = threshold_like([score_episode(each, config, reward) for each in episodes], config)
        self.report(arm, step, self.point(tau, f"calibrated, T {policy.temperature:g}"))
        self.report(
            f"{arm} drawn", step, self.drawn(policy, f"last policy, T {policy.temperature:g}")
        )

    def point(self, tau: float, asked: str) -> Point:
        bench, reward = self.bench, self.settings.learner.reward
        gates = threshold_gates(tau, bench.never_skip)
        dense_RN = own_dense(self.model, bench.scoring) if self.dense_moves else None
        return measure_point(self.model, bench.scoring, gates, reward, asked, tau, dense_RN)

    def drawn(self, policy: GatePolicy, asked: str) -> Point:
        bench, reward = self.bench, self.settings.learner.reward
        gates = drawn_gates(self.model.config, policy, bench.drawn.seeds, bench.never_skip)
        dense_RN = own_dense(self.model, bench.drawn) if self.dense_moves else None
        return measure_point(self.model, bench.drawn, gates, reward, asked, None, dense_RN)

    def heldout_rollout(self, policy: GatePolicy | None, tau: float) -> RolloutSettings:
        """On the dense model's greedy continuations, for every trial."""
        asked = self.settings.episodes.rollout(policy, self.end_ids, tau, self.bench.never_skip)
        return replace(asked, sampled_by=Sampler.DENSE, temperature=0.0)

    def curves(self, arm: str, step: int, moved: bool) -> dict[str, Curve]:
        """By arm: thresholds, draws, the thresholds' layer rates without their choice of tokens; controls of no-RL."""
        bench, reward, seed = self.bench, self.settings.learner.reward, self.settings.seed
        thresholds = bench.thresholds(reward, moved)
        found = {
            arm: thresholds,
            f"{arm} drawn": bench.draws(self.policy(self.settings.steps - 1), reward, moved),
            f"{arm} layer rates": bench.at_rates(
                [(float(point.asked), point.rate_L) for point in thresholds[1:]], reward, seed
            ),
        }
        if arm == "no-RL":
            found |= {"random": bench.random(reward, seed), "static": bench.static(reward)}
        for name, curve in found.items():
            for point in curve[1:]:
                self.report(name, step, point)
        return found

    def own_texts(
        self, arm: str, step: int, curve: Curve, reference: Mapping[float, OwnText]
    ) -> dict[float, OwnText]:
        """What the gated model writes for the scoring questions, tokens drawn at temperature 1, by skip ratio.

        curve: thresholds, of which two are taken. reference: what the difference is to, of the same ratios.
        """
        if self.settings.episodes.max_new_tokens == 0:
            return {}
        tau_of = {point.asked: point.parameter for point in curve}
        found = {}
        for ratio in own_ratios(self.bench.ratios):
            tau = tau_of[ratio]
            assert tau is not None, "a curve of thresholds"
            asked = replace(
                self.heldout_rollout(None, tau), sampled_by=Sampler.GATED, temperature=1.0
            )
            found[ratio] = OwnText.of(self.rollouts.roll(self.scoring, asked))
            minus = found[ratio].minus(reference[ratio]) if ratio in reference else None
            row = {"kind": "own", "arm": arm, "asked": ratio, "parameter": tau}
            self.emit({**self.base(step), **row, **found[ratio].record(), "minus_no_rl": minus})
        return found

    def compare(self, curves: Mapping[str, Curve], step: int) -> None:
        """A row for each ratio and arm, with its paired difference to the no-RL gate."""
        for ratio in self.bench.ratios:
            for arm, curve in curves.items():
                here = at_skip(curve, ratio)
                if here is None:
                    continue
                other = at_skip(curves[reference_of(arm)], ratio)
                difference = None
                if other is not None and reference_of(arm) != arm:
                    difference = {n: paired_difference(here.of(n), other.of(n)) for n in _COMPARED}
                row = {"kind": "equal", "arm": arm, "asked": ratio, **here.record()}
                self.emit({**self.base(step), **row, "minus_no_rl": difference})

    # --- rows -----------------------------------------------------------------------------------------

    def base(self, step: int) -> dict[str, Any]:
        return {"config": self.name, "seed": self.settings.seed, "step": step}

    def report(self, arm: str, step: int, point: Point) -> None:
        row = {"kind": "point", "arm": arm, "asked": point.asked, "parameter": point.parameter}
        rates = [round(rate, 3) for rate in point.rate_L]
        self.emit({**self.base(step), **row, **point.record(), "layers": rates})

    def line(self, done: int, record: Mapping[str, Any]) -> str:
        return (
            f"{self.name} seed {self.settings.seed}: {done}/{self.settings.steps} reward {record['reward/total']:+.4f} "
            f"skip {record['gate/skip_rate']:.1%} KL {record['ppo/approx_kl']:.4f} flips "
            f"{record['mismatch/flip_rate']:.5f}; rollout {record['rollout_s']:.2f} s, learn {record['learn_s']:.2f} s"
        )


def keep(model: FBSForCausalLM) -> dict[str, Tensor]:
    """A copy of everything that FBS added to the model."""
    return {name: tensor.detach().clone() for name, tensor in added_tensors(model)}


@torch.no_grad()
def restore(model: FBSForCausalLM, kept: Mapping[str, Tensor]) -> None:
    """Put back what keep() returned."""
    for name, tensor in added_tensors(model):
        tensor.copy_(kept[name])
    model.model.forget_derived()
