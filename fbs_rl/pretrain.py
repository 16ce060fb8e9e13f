"""python -m fbs_rl.pretrain: Stage 1, from prepared shards to a trained FBS checkpoint, on Ray with DeepSpeed.

python -m fbs_rl.data prepare TEXT... --out DATA
python -m fbs_rl.pretrain --data DATA --config default
ray job submit --working-dir . -- python -m fbs_rl.pretrain --data DATA --set cluster.ranks=8
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fbs_rl.config import to_tree
from fbs_rl.interruption import Interruption
from fbs_rl.pretrain_options import Request, read_request
from fbs_rl.run_folder import RunFolder
from fbs_rl.tracking import Tracker, start_tracker
from fbs_rl.training.bad_steps import BadSteps
from fbs_rl.training.console import StepConsole
from fbs_rl.training.plan_report import plan_table
from fbs_rl.training.settings import PretrainSettings
from fbs_rl.training.step_checkpoint import CheckpointStore

if TYPE_CHECKING:
    from actors.pretrain_session import PretrainSession


class Stopped(RuntimeError):
    """The run ended before its last step, for a reason that starting again would not cure."""


@dataclasses.dataclass(slots=True)
class Training:
    """One run: what it was asked, where it writes, what it has counted.

    restarts: gangs lost. failures: those since the last new checkpoint. lost_at: when the last gang was lost,
    until a step is done.
    """

    settings: PretrainSettings
    run: RunFolder
    tracker: Tracker
    console: StepConsole
    data_digest: str
    bad_steps: BadSteps
    interruption: Interruption = dataclasses.field(default_factory=Interruption)
    restarts: int = 0
    failures: int = 0
    tokens: float = 0.0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    device: str | None = None
    lost_at: float | None = None

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.run.path / "checkpoints")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside the engines."""
        return {
            "bad_steps": self.bad_steps.count,
            "tokens": self.tokens,
            "figures": self.figures,
            "wandb_id": self.tracker.id,
            "data": self.data_digest,
            "settings": to_tree(self.settings),
        }

    def take_up(self, session: PretrainSession) -> None:
        """Count on from where the session's checkpoint stood."""
        self.bad_steps.take_up(session.state.get("bad_steps", 0), session.step)
        self.tokens = session.state.get("tokens", 0.0)
        self.figures = session.state.get("figures", {})
        self.device = session.facts["device"]
        self.console.begin(session.step)

    def log(self, step: int, record: dict[str, Any]) -> None:
        record = {"train/step": step, "run/restarts": self.restarts, **record}
        self.run.log(record)
        self.tracker.log(record)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 stopped, 2 a request that cannot be met, 130 interrupted."""
    try:
        request = read_request(argv, __doc__ or "")
        plan = plan_table(request.settings, request.config, request.rows)
    except (ValueError, OSError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    if request.dry:
        print(plan)
        return 0
    return _run(request, plan)


def _run(request: Request, plan: str) -> int:
    from actors.cluster import connect

    training = _open(request)
    training.console.say(plan)
    began, done, reason = time.monotonic(), 0, ""
    try:
        cluster = training.settings.cluster
        connect(cluster.ranks * cluster.cpus_per_rank)
        with training.interruption.awaited():
            done = train(training)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error)
    finally:
        training.console.stop()
    done = done or max(training.store.steps(), default=0)
    complete = done >= training.settings.phases.steps and not reason
    training.run.summarise(_summary(training, done, time.monotonic() - began, reason))
    training.tracker.finish(failed=not complete)
    if complete:
        final = training.run.path / "final"
        training.console.say(
            f"Done: {final} is a Hugging Face folder. See it skip:\n"
            f"  python -m fbs_rl.generate {final} --prompt ... --compare-dense"
        )
        return 0
    print(_farewell(training, done, reason), file=sys.stderr)
    return 130 if training.interruption.asked else 1


def train(training: Training) -> int:
    """Run all steps, starting the gang again from the last checkpoint when a rank is lost; the steps done."""
    from actors.gang import GangFailure, NoRoom
    from actors.pretrain_session import open_session

    say, total, started = training.console.say, training.settings.phases.steps, False
    while True:
        newest = max(training.store.steps(), default=0)
        try:
            with open_session(
                training.settings, training.store, training.run.path.name, say
            ) as session:
                started = True
                say(session.description)
                training.run.log({"train/step": session.step, **session.record})
                done = advance(training, session)
            if done >= total or training.interruption.asked:
                return done
        except GangFailure as failure:
            if isinstance(failure, NoRoom) and not started:
                raise Stopped(str(failure)) from failure
            _count_failure(training, newest, failure)
            say(f"{failure}; starting again from step {max(training.store.steps(), default=0)}")


def advance(training: Training, session: PretrainSession) -> int:
    """Steps from where the session stands to the end (or to where it should be restarted); the steps done."""
    settings, phases = training.settings, training.settings.phases
    training.take_up(session)
    teacher = training.run.path / "teacher"
    if session.step == 0:
        evaluate(training, session, 0)
    elif phases.teacher == "phase_1a" and session.step > phases.observed_steps:
        session.read_teacher(teacher)
    for step in range(session.step, phases.steps):
        if step == phases.observed_steps and phases.teacher == "phase_1a":
            session.export(teacher, None)
            session.read_teacher(teacher)
        sound = take_step(training, session, step)
        last = step + 1 == phases.steps
        if last or (step + 1) % settings.evaluation.every_steps == 0:
            evaluate(training, session, step + 1)
        stops = (
            training.interruption.asked
        )  # looked at once: a signal that comes later waits a step
        due = stops or (step + 1) % settings.checkpoint.every_steps == 0
        if last or (due and sound):
            session.save(training.store, step + 1, training.state())
        if not last and (stops or (due and session.can_grow)):
            return step + 1
    session.export(training.run.path / "final", _deployed_tau(training))
    return phases.steps


def take_step(training: Training, session: PretrainSession, step: int) -> bool:
    """Take and log step `step` (0-based); False if its loss or gradient was not finite, and it was not applied."""
    record = session.run_step(step)
    training.tokens += record["train/tokens"]
    sound = record["train/applied"] and record["train/finite"]
    bad = training.bad_steps.count + (not sound)
    record |= {"train/total_tokens": training.tokens, "train/bad_steps": bad}
    if training.lost_at is not None:
        record["run/restart_s"] = time.monotonic() - training.lost_at
        training.lost_at = None
    training.log(step + 1, record)
    training.console.step(step, _step_line(record), record["train/phase"])
    if not sound:
        training.console.say(
            f"step {step + 1}: loss or gradient is not finite; the step was not applied"
        )
    training.bad_steps.note(step, sound)
    return sound


def evaluate(training: Training, session: PretrainSession, step: int) -> None:
    """Held-out figures and sample texts after `step` steps."""
    training.figures = session.evaluate()
    training.log(step, dict(training.figures))
    training.console.say(_heldout_line(step, training.figures))
    if training.settings.evaluation.sample_prompts:
        rows = [{"step": step, **row} for row in session.sample()]
        training.run.log({"train/step": step, "eval/samples": rows})
        training.tracker.table("eval/samples", step, rows)


# --- before and after -------------------------------------------------------------------------------------


def _open(request: Request) -> Training:
    """Make or mend the run folder, and start the tracker and the console."""
    settings, run, tree = request.settings, request.run, to_tree(request.settings)
    if request.resumes:
        run.mend()
    else:
        run.open("pretrain", tree)
    tracker = start_tracker(
        settings.tracking.wandb,
        settings.tracking.project,
        run.path,
        tree,
        None if request.state is None else request.state["wandb_id"],
    )
    console = StepConsole(settings.phases.steps, settings.tracking.log_every_steps)
    bad_steps = BadSteps(settings.max_bad_steps)
    return Training(settings, run, tracker, console, request.rows.digest, bad_steps)


def _count_failure(training: Training, newest_before: int, failure: Exception) -> None:
    """Raises Stopped if the gang was lost too often without a new checkpoint, or the run should end anyway."""
    if training.lost_at is None:
        training.lost_at = time.monotonic()
    advanced = max(training.store.steps(), default=0) > newest_before
    training.failures = 1 if advanced else training.failures + 1
    training.restarts += 1
    if training.interruption.asked or training.failures > training.settings.cluster.max_restarts:
        raise Stopped(str(failure)) from failure


def _deployed_tau(training: Training) -> float | None:
    """The threshold of the highest skip ratio up to the run's target that was evaluated; None without phase 1b."""
    phases = training.settings.phases
    if phases.observed_steps == phases.steps:
        return None
    ratios = sorted(training.settings.evaluation.skip_ratios)
    fitting = [ratio for ratio in ratios if ratio <= phases.skip_target + 1e-9]
    taus = [training.figures.get(f"eval/skip_{round(100 * ratio)}/tau") for ratio in fitting]
    return next((tau for tau in reversed(taus) if tau is not None), None)


def _step_line(record: dict[str, Any]) -> str:
    parts = [f"loss {record['train/loss']:.4f}"]
    if "gate/skip_ratio" in record and record["train/phase"] == "1b":
        parts.append(f"skip {record['gate/skip_ratio']:5.1%} (aim {record['gate/target']:.0%})")
    parts.append(f"{record['perf/tokens_per_s']:,.0f} tokens/s")
    if "perf/mfu" in record:
        parts.append(f"MFU {record['perf/mfu']:.1%}")
    memory = record.get("perf/gpu_gb", record["perf/rss_gb"])
    parts.append(f"{memory:.1f} GB")
    return "  ".join(parts)


def _heldout_line(step: int, figures: dict[str, float]) -> str:
    parts = [f"held-out after {step} steps: dense {figures['eval/ppl_dense']:.2f}"]
    for key, value in figures.items():
        if key.endswith("/ppl"):
            prefix = key.removesuffix("/ppl")
            parts.append(f"{value:.2f} at {figures[f'{prefix}/skip_ratio']:.0%} skipped")
    if "eval/boundary_f1" in figures:
        parts.append(f"boundary F1 {figures['eval/boundary_f1']:.2f}")
    return ", ".join(parts)


def _farewell(training: Training, done: int, reason: str) -> str:
    """Why the run ended early, and how to go on."""
    total, why = training.settings.phases.steps, reason or "it was interrupted"
    return (
        f"pretrain: stopped after {done} of {total} steps: {why}; {training.bad_steps.kept(training.store)}; "
        f"go on with --resume {training.run.path}"
    )


def _summary(training: Training, done: int, seconds: float, reason: str) -> dict[str, Any]:
    evaluations = [r for r in training.run.records() if "eval/ppl_dense" in r]
    return {
        "steps_asked": training.settings.phases.steps,
        "steps_done": done,
        "stopped_because": reason or ("interrupted" if training.interruption.asked else None),
        "tokens": training.tokens,
        "bad_steps": training.bad_steps.count,
        "restarts": training.restarts,
        "seconds": round(seconds, 1),
        "device": training.device,
        "ranks": training.settings.cluster.ranks,
        "before": evaluations[0] if evaluations else None,
        "after": evaluations[-1] if evaluations else None,
    }


if __name__ == "__main__":
    sys.exit(main())
