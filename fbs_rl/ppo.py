"""python -m fbs_rl.ppo: Stage 2, PPO over the skip policy, with rollouts on vLLM engines that really skip.

python -m fbs_rl.ppo --beta 0.1 --lam 0.1 --model RUN/final
ray job submit --working-dir . -- python -m fbs_rl.ppo --beta 0.1 --lam 0.1 --set fleet.engines=8
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fbs_rl.interruption import Interruption
from fbs_rl.ppo_options import Request, describe, read_request, settings_tree
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.rl.run_plots import draw_run
from fbs_rl.run_folder import RunFolder
from fbs_rl.tracking import Tracker, start_tracker
from fbs_rl.training.bad_steps import BadSteps
from fbs_rl.training.console import StepConsole
from fbs_rl.training.step_checkpoint import CheckpointStore

if TYPE_CHECKING:
    from actors.ppo_session import PPOSession


@dataclasses.dataclass(slots=True)
class Stage2:
    """One run: what it was asked, where it writes. figures: of the newest evaluation. tau: calibrated at the end."""

    request: Request
    tracker: Tracker
    console: StepConsole
    bad_steps: BadSteps
    interruption: Interruption = dataclasses.field(default_factory=Interruption)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    tau: float | None = None

    @property
    def settings(self) -> PPOSettings:
        return self.request.settings

    @property
    def run(self) -> RunFolder:
        return self.request.run

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.run.path / "checkpoints")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside the learner."""
        return {
            "bad_steps": self.bad_steps.count,
            "wandb_id": self.tracker.id,
            "pool": self.request.plan.pool.digest,
            "settings": settings_tree(self.settings),
            "figures": self.figures,
            "first_figures": self.first_figures,
        }

    def take_up(self, session: PPOSession) -> None:
        """Count on from where the session's checkpoint stood."""
        self.bad_steps.take_up(session.state.get("bad_steps", 0), session.step)
        self.figures = session.state.get("figures", {})
        self.first_figures = session.state.get("first_figures", {})
        self.console.begin(session.step)

    def log(self, step: int, record: dict[str, Any]) -> None:
        record = {"train/step": step, **record}
        self.run.log(record)
        self.tracker.log(record)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 stopped, 2 a request that cannot be met, 130 interrupted."""
    try:
        request = read_request(argv, __doc__ or "")
    except (ValueError, OSError) as error:
        print(f"ppo: {error}", file=sys.stderr)
        return 2
    if request.dry:
        print(describe(request))
        return 0
    return _run(request)


def _run(request: Request) -> int:
    from actors.cluster import connect

    stage, began = _open(request), time.monotonic()
    stage.console.say(describe(request))
    done, reason = 0, ""
    try:
        connect(request.settings.fleet.cpus)
        with stage.interruption.awaited():
            done = train(stage)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error)
    finally:
        stage.console.stop()
    done = done or max(stage.store.steps(), default=0)
    return _close(stage, done, reason, time.monotonic() - began)


def train(stage: Stage2) -> int:
    """All steps, with evaluations and checkpoints between them, then the calibrated model; the steps done."""
    from actors.ppo_session import open_session

    request, total = stage.request, stage.settings.steps
    with open_session(request, stage.store, stage.console.say) as session:
        stage.take_up(session)
        if session.step == 0:
            evaluate(stage, session, 0)
        for step in range(session.step, total):
            sound = take_step(stage, session, step)
            last = step + 1 == total
            if last or (step + 1) % stage.settings.evaluation.every_steps == 0:
                evaluate(stage, session, step + 1)
            stops = stage.interruption.asked  # looked at once: a later signal waits a step
            due = stops or (step + 1) % stage.settings.checkpoint.every_steps == 0
            if last or (due and sound):
                session.save(stage.store, step + 1, stage.state())
            if stops and not last:
                return step + 1
        calibrate(stage, session)
        session.export(stage.run.path / "final", stage.tau)
    return total


def take_step(stage: Stage2, session: PPOSession, step: int) -> bool:
    """Rollouts, rewards, one update of the gates, and the gates back to the engines; False if a part was not finite."""
    began = time.monotonic()
    episodes = session.roll(step)
    record = session.update(step, episodes)
    record |= session.sync(step + 1) | {"perf/step_s": time.monotonic() - began}
    stage.log(step + 1, record)
    stage.console.step(step, _step_line(record))
    bad = record["train/bad_steps"]
    if bad:
        stage.console.say(
            f"step {step + 1}: loss or gradient of {bad} of {bad + record['train/optimizer_steps']} optimizer steps "
            f"is not finite; they were not applied"
        )
    stage.bad_steps.note(step, not bad)
    return not bad


def evaluate(stage: Stage2, session: PPOSession, step: int) -> None:
    """Held-out questions with deterministic gates: figures, example episodes, pictures."""
    stage.figures, rows = session.evaluate(session.tau)
    stage.first_figures = stage.first_figures or stage.figures
    stage.log(step, dict(stage.figures))
    stage.run.log({"train/step": step, "eval/episodes": rows})
    stage.tracker.table("eval/episodes", step, rows)
    stage.tracker.pictures(step, draw_run(stage.run.records(), stage.run.path / "pictures"))
    stage.console.say(_heldout_line(step, stage.figures))


def calibrate(stage: Stage2, session: PPOSession) -> None:
    """The threshold at which held-out questions skip as often as the trained policy does, and what it gives."""
    stage.tau = session.calibrated_tau()
    stage.figures, _ = session.evaluate(stage.tau)
    stage.log(stage.settings.steps, {**stage.figures, "eval/tau": stage.tau})
    stage.console.say(f"tau {stage.tau:.3f}: {_heldout_line(stage.settings.steps, stage.figures)}")


# --- before and after -----------------------------------------------------------------------------


def _open(request: Request) -> Stage2:
    """Make or mend the run folder, write down the questions, start the tracker and the console."""
    settings, run, tree = request.settings, request.run, settings_tree(request.settings)
    if request.resumes:
        run.mend()
    else:
        run.open("ppo", tree)
        request.plan.pool.write(run.path / "questions")
    known = None if request.state is None else request.state["wandb_id"]
    tracking = settings.tracking
    tracker = start_tracker(tracking.wandb, tracking.project, run.path, tree, known)
    console = StepConsole(settings.steps, tracking.log_every_steps)
    return Stage2(request, tracker, console, BadSteps(settings.max_bad_steps))


def _close(stage: Stage2, done: int, reason: str, seconds: float) -> int:
    complete = done >= stage.settings.steps and not reason
    stage.run.summarise(
        {
            "steps_asked": stage.settings.steps,
            "steps_done": done,
            "stopped_because": reason or ("interrupted" if stage.interruption.asked else None),
            "bad_steps": stage.bad_steps.count,
            "seconds": round(seconds, 1),
            "tau": stage.tau,
            "before": stage.first_figures,
            "after": stage.figures,
        }
    )
    stage.tracker.finish(failed=not complete)
    if complete:
        stage.console.say(_result(stage))
        return 0
    why = reason or "it was interrupted"
    print(
        f"ppo: stopped after {done} of {stage.settings.steps} steps: {why}; {stage.bad_steps.kept(stage.store)}; "
        f"go on with --resume {stage.run.path}",
        file=sys.stderr,
    )
    return 130 if stage.interruption.asked else 1


def _step_line(record: dict[str, Any]) -> str:
    return (
        f"reward {record['reward/total']:+.4f} = compute {record['reward/compute_term']:+.4f} "
        f"quality {record['reward/quality_term']:+.4f}  skip {record['gate/skip_rate']:.1%}  "
        f"KL {record['ppo/approx_kl']:.4f}  {record['perf/step_s']:.0f} s"
    )


def _heldout_line(step: int, figures: dict[str, Any]) -> str:
    return (
        f"held-out after {step} steps: reward {figures['eval/reward']:+.4f}, "
        f"{figures['eval/skip_ratio']:.1%} skipped, FLOPs {figures['eval/executed_flops_frac']:.3f} of dense, "
        f"NLL {figures['eval/nll_increase']:+.4f}, gold perplexity {figures['eval/gold_ppl']:.2f} "
        f"(dense {figures['eval/gold_ppl_dense']:.2f})"
    )


def _result(stage: Stage2) -> str:
    final, first, last = stage.run.path / "final", stage.first_figures, stage.figures
    return (
        f"Done. Held-out reward {first['eval/reward']:+.4f} -> {last['eval/reward']:+.4f} at "
        f"{last['eval/skip_ratio']:.1%} of layers skipped (tau {stage.tau:.3f}).\n"
        f"{final} is a Hugging Face folder; pictures are in {stage.run.path}/pictures. See it skip:\n"
        f"  python -m fbs_rl.generate {final} --prompt ... --compare-dense\n"
        f"  vllm serve {final}"
    )


if __name__ == "__main__":
    sys.exit(main())
