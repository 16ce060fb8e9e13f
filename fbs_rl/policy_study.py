"""python -m fbs_rl.policy_study: does PPO find a better skip policy than it was given, at equal measured skip?

    python -m fbs_rl.policy_study --model runs/first/final --seeds 0,1,2 --updates 40 --out study.jsonl
    python -m fbs_rl.policy_study --stage1 prepared --stage1-set phases.steps=2000 --keep start --out study.jsonl
    python -m fbs_rl.policy_study --model runs/first/final --writers dense,gated --temperature 1 --out study.jsonl
    python -m fbs_rl.policy_study --table study.jsonl

Everything in this process, on one device, without Ray and vLLM: episodes come from the model's own passes. The
continuations that are trained on are the dense model's greedy ones, or written by the gated policy itself (--writers).
Questions are held out from training; on half of them thresholds are set, on the other half every arm is measured, on
the dense model's greedy continuations whoever wrote those of training. Each row is appended to --out as soon as it is
known.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fbs_rl.checkpoint import LoadedModel, load_model, load_tokenizer
from fbs_rl.config import load_settings
from fbs_rl.model.backbone import ModelSource
from fbs_rl.model.compiled import as_written
from fbs_rl.ppo_options import make_plan
from fbs_rl.rl.end_tokens import end_tokens
from fbs_rl.rl.heldout_points import Heldout
from fbs_rl.rl.parallel_rollouts import ParallelRollouts
from fbs_rl.rl.policy_trial import Trial, keep, restore
from fbs_rl.rl.ppo_settings import EpisodeSettings, PPOSettings
from fbs_rl.rl.reward import Sampler
from fbs_rl.rl.rollout import RolloutTask
from fbs_rl.rl.rollout_plan import RolloutPlan
from fbs_rl.rl.skip_curves import Bench
from fbs_rl.rl.start_folder import check_start
from fbs_rl.rl.study_table import Row, study_tables
from fbs_rl.seeds import stable_hash
from fbs_rl.study_start import stage1_settings, start_folder, train_start

_DRAWS = 4
"""Episodes of each held-out question where gates are drawn."""


@dataclasses.dataclass(slots=True)
class Study:
    """What was asked, found to be possible. plans: settings and questions of each configuration and writer, by name.

    folder: the start.
    """

    options: argparse.Namespace
    plans: dict[str, RolloutPlan]
    seeds: list[int]
    ratios: tuple[float, ...]
    folder: Path
    rows: list[Row] = dataclasses.field(default_factory=list)

    def emit(self, row: Row) -> None:
        self.rows.append(row)
        if self.options.out:
            with Path(self.options.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a request that cannot be met."""
    options = _parser().parse_args(argv)
    try:
        if options.table:
            print(study_tables(row for name in options.table for row in read_rows(Path(name))))
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            study = prepare(options, Path(options.keep or scratch))
            with as_written():  # Stage 1 may have switched compilation on
                run(study)
    except (ValueError, OSError) as error:
        print(f"policy_study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(study_tables(study.rows))
    return 0


def read_rows(file: Path) -> list[Row]:
    """What a study appended to `file`. Raises ValueError or OSError."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{file} holds no rows of a study ({error})") from None


# --- before the first trial -------------------------------------------------------------------------


def prepare(options: argparse.Namespace, made: Path) -> Study:
    """Check everything, and make the start if it has to be made, in `made`."""
    if (options.model is None) == (options.stage1 is None):
        raise ValueError("give --model or --stage1, exactly one of them")
    for name in ("heldout", "every"):
        if getattr(options, name) < 2 - (name == "every"):
            raise ValueError(f"--{name} is {getattr(options, name)}; give a larger number")
    ratios = _numbers(options.ratios, float, "--ratios", "shares such as 0.1,0.2")
    if not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(f"--ratios is {options.ratios}; shares of layers lie between 0 and 1")
    writers = _writers(options)
    seeds = _numbers(options.seeds, int, "--seeds", "whole numbers such as 0,1,2")
    model = options.model or options.backbone
    names = options.configs.split(",")
    settings = {name: _settings(options, name, model) for name in names}
    _set_device(next(iter(settings.values())))
    source = ModelSource.parse(model)
    sizes = [check_start(each).vocab_size for each in settings.values()]
    tokenizer = load_tokenizer(source, sizes[0])
    plans = {name: make_plan(each, tokenizer) for name, each in settings.items()}
    for plan in plans.values():
        if len(plan.pool.heldout) < options.heldout:
            raise ValueError(
                f"the pool holds {len(plan.pool.heldout)} questions out and {options.heldout} are wanted; "
                f"lower --heldout, raise questions.heldout_frac or add sources"
            )
    written = {
        _arm_name(name, episodes): dataclasses.replace(
            plan, settings=dataclasses.replace(plan.settings, episodes=episodes)
        )
        for name, plan in plans.items()
        for episodes in _episodes(plan.settings, writers, options.temperature)
    }
    if options.stage1:
        trained = stage1_settings(
            options.stage1, model, options.stage1_arm, options.stage1_config, options.stage1_set
        )
        folder = train_start(trained, made / "stage1", _say)
    else:
        folder = start_folder(next(iter(settings.values())), made / "start", _say)
    return Study(options, written, seeds, tuple(sorted(ratios)), folder)


def _settings(options: argparse.Namespace, config: str, model: str) -> PPOSettings:
    shared = (
        f"model={model}",
        f"learner.updates={options.updates}",
        f"learner.runtime.device={options.device}",
        f"episodes.prompts={options.questions}",
        f"episodes.samples={options.samples}",
        f"episodes.max_new_tokens={options.tokens}",
        "questions.heldout_frac=0.3",
    )
    return load_settings(PPOSettings, config, [*shared, *options.set])


def _writers(options: argparse.Namespace) -> list[Sampler]:
    """Who writes. Raises ValueError for other names, and for settings that they would overrule."""
    names = options.writers.split(",")
    if not set(names) <= {Sampler.DENSE, Sampler.GATED}:
        raise ValueError(f"--writers is {options.writers!r}; give dense, gated or dense,gated")
    for given in options.set:
        if given.startswith(("episodes.sampled_by", "episodes.temperature")):
            raise ValueError(
                f"--set {given} has no effect here; say it with --writers and --temperature"
            )
    return [Sampler(name) for name in names]


def _episodes(
    settings: PPOSettings, writers: Sequence[Sampler], temperature: float
) -> list[EpisodeSettings]:
    """Of each writer: the dense model's tokens are greedy, the gated policy's drawn."""
    return [
        dataclasses.replace(
            settings.episodes, sampled_by=writer, temperature=temperature if writer is Sampler.GATED else 0.0
        )
        for writer in writers
    ]  # fmt: skip


def _arm_name(config: str, episodes: EpisodeSettings) -> str:
    if episodes.sampled_by is Sampler.DENSE:
        return config
    return f"{config}, gated writes at T {episodes.temperature:g}"


def _set_device(settings: PPOSettings) -> None:
    runtime = settings.learner.runtime
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device on this machine")
    torch.set_num_threads(runtime.threads)


def _numbers(text: str, kind: Callable[[str], Any], name: str, wanted: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give {wanted}") from None


# --- trials -----------------------------------------------------------------------------------------


def run(study: Study) -> None:
    """Every configuration with every seed, one after the other."""
    loaded = _load(study.folder, next(iter(study.plans.values())).settings)
    start, ends = keep(loaded.model), end_tokens(loaded.model.config, loaded.tokenizer)
    for name, plan in study.plans.items():
        began = time.monotonic()
        restore(loaded.model, start)
        rollouts = ParallelRollouts(loaded.model, study.options.batch)
        tuning, scoring = _halves(plan, study.options.heldout)
        bench = _bench(study, plan, rollouts, (tuning, scoring), ends)
        _say(
            f"{name}: {len(scoring)} questions measured; ready in {time.monotonic() - began:.1f} s"
        )
        for seed in study.seeds:
            began = time.monotonic()
            settings = dataclasses.replace(plan.settings, seed=seed)
            pool = dataclasses.replace(plan.pool, seed=seed)  # the same questions in another order
            seeded = dataclasses.replace(plan, settings=settings, pool=pool)
            Trial(
                name, settings, seeded, rollouts, bench, tuning, scoring, start, ends, study.options.every, study.emit,
                _say,
            ).run()  # fmt: skip
            _say(f"{name} seed {seed}: {time.monotonic() - began:.1f} s in all")


def _load(folder: Path, settings: PPOSettings) -> LoadedModel:
    """The start on its device, in the learner's numbers."""
    runtime = settings.learner.runtime
    use_cuda = runtime.device != "cpu" and torch.cuda.is_available()
    halves = use_cuda if runtime.precision == "auto" else runtime.precision == "bf16"
    loaded = load_model(str(folder), dtype=torch.bfloat16 if halves else torch.float32)
    model: Any = loaded.model
    model.config._attn_implementation = runtime.attention
    model.to("cuda" if use_cuda else "cpu")
    if runtime.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()  # the library checkpoints in training mode alone
    return loaded


def _halves(plan: RolloutPlan, count: int) -> tuple[list[RolloutTask], list[RolloutTask]]:
    """Held-out questions to set knobs on, and others to measure on: the same for every seed."""
    order = sorted(plan.pool.heldout, key=lambda question: stable_hash("policy study", question.id))
    tasks = []
    for question in order[:count]:
        tokens = plan.encoded[question.id]
        seed = stable_hash("policy study draws", question.id)
        tasks.append(
            RolloutTask(question.id, tuple(tokens.prompt_ids), tuple(tokens.answer_ids), (seed,))
        )
    return tasks[::2], tasks[1::2]


def _bench(
    study: Study, plan: RolloutPlan, rollouts: ParallelRollouts,
    halves: tuple[list[RolloutTask], list[RolloutTask]], ends: tuple[int, ...],
) -> Bench:  # fmt: skip
    """The held-out questions with their continuations, and which ratios the model can reach."""
    settings, model = plan.settings, rollouts.model
    (episodes,) = _episodes(settings, [Sampler.DENSE], 0.0)
    rollout = episodes.rollout(None, ends)

    def heldout(tasks: list[RolloutTask], samples: int) -> Heldout:
        seeds = [task.seeds[0] for task in tasks]
        rollouts.check(tasks, rollout)
        texts = rollouts.texts(tasks, rollout)
        return Heldout.of(model, texts, seeds, samples, rollouts.batch_tokens)

    tuning, scoring = halves
    never_skip = settings.learner.never_skip
    free = model.config.layer_count - len(model.config.forced_layers(never_skip))
    reached = tuple(r for r in study.ratios if r < free / model.config.layer_count)
    if not reached:
        raise ValueError(
            f"only {free} of {model.config.layer_count} layers may skip, fewer than any of --ratios asks for"
        )
    return Bench(
        model, heldout(tuning, 1), heldout(scoring, 1), heldout(scoring, _DRAWS), reached, never_skip
    )  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fbs_rl.policy_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--model", help="FBS folder, or a backbone that is given gates first")
    parser.add_argument(
        "--stage1", metavar="DATA", help="train the start on this prepared data first"
    )
    parser.add_argument("--stage1-arm", default="default", help="of fbs_rl.frontier (default)")
    parser.add_argument("--stage1-config", default="default", help="settings of Stage 1 (default)")
    parser.add_argument("--stage1-set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--backbone", default="smollm2-135m", help="that Stage 1 begins with")
    parser.add_argument(
        "--keep", metavar="DIR", help="where a start that is made stays, to be taken again"
    )
    parser.add_argument("--configs", default="ppo_default,ppo_paper", help="settings of Stage 2")
    parser.add_argument(
        "--writers",
        default="dense",
        help="of the continuations trained on: dense, gated or both (dense)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of the tokens that the gated policy writes (1); 0 is greedy",
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--questions", type=int, default=16, help="of an update (16)")
    parser.add_argument("--samples", type=int, default=8, help="of each question (8)")
    parser.add_argument("--tokens", type=int, default=48, help="of a continuation, at most (48)")
    parser.add_argument(
        "--heldout", type=int, default=128, help="questions that are held out (128)"
    )
    parser.add_argument("--ratios", default="0.05,0.1,0.15,0.2,0.3,0.36", help="of layers skipped")
    parser.add_argument("--every", type=int, default=10, help="updates between evaluations (10)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16384, help="tokens of one pass (16384)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of Stage 2"
    )
    parser.add_argument("--out", metavar="FILE", help="rows are appended to it, as JSON lines")
    parser.add_argument(
        "--table", nargs="+", metavar="FILE", help="only print the tables of these rows"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
