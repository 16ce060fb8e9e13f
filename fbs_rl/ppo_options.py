"""The command line of fbs_rl.ppo: what is asked, checked against itself and against the run to go on with."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fbs_rl.checkpoint import load_tokenizer
from fbs_rl.config import load_settings, to_tree
from fbs_rl.model.backbone import ModelSource
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.option_parser import OptionParser
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.rl.question_pool import PoolConfig, QuestionPool, build_pool, default_pool
from fbs_rl.rl.rollout_plan import RolloutPlan
from fbs_rl.rl.start_folder import check_start
from fbs_rl.run_folder import RunFolder
from fbs_rl.run_options import Resumption, check_device, run_parser
from fbs_rl.training.step_checkpoint import CheckpointStore

_RESUMPTION = Resumption(free=("fleet", "checkpoint", "evaluation", "tracking", "max_bad_steps"))
_SHORT = {
    "beta": "learner.reward.beta",
    "lam": "learner.reward.lam",
    "model": "model",
    "steps": "learner.updates",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is to be run, found to be possible. state: of the newest checkpoint, None for a new run."""

    settings: PPOSettings
    run: RunFolder
    resumes: bool
    dry: bool
    config: FBSConfig
    plan: RolloutPlan
    tokenizer: Any
    state: dict[str, Any] | None


def read_request(argv: Sequence[str] | None, description: str) -> Request:
    """The request on the command line. Raises ValueError or OSError, in one sentence, for one that cannot be met."""
    options = _parser(description).parse_args(argv)
    if options.resume:
        settings, run = _resumed(options)
    else:
        settings = load_settings(PPOSettings, options.config, _overrides(options))
        run = RunFolder.plan("ppo", options.out)
    check_device("fleet.device", settings.fleet.device)
    config = check_start(settings)
    tokenizer = load_tokenizer(ModelSource.parse(settings.model), config.vocab_size)
    plan = make_plan(settings, tokenizer)
    state = CheckpointStore(run.path / "checkpoints").newest_state() if options.resume else None
    if state is not None:
        _check_same_run(run, state, settings, plan)
    return Request(
        settings, run, bool(options.resume), options.dry_run, config, plan, tokenizer, state
    )


def _check_same_run(
    run: RunFolder, state: dict[str, Any], settings: PPOSettings, plan: RolloutPlan
) -> None:
    """ValueError if the run's settings or questions are not those its checkpoints were made with."""
    _RESUMPTION.check_unchanged(run.path, state["settings"], settings_tree(settings))
    if state["pool"] != plan.pool.digest:
        raise ValueError(
            f"the questions are others than {run.path} was trained on so far; restore them or start a new run"
        )


def make_plan(settings: PPOSettings, tokenizer: Any) -> RolloutPlan:
    """The pool and its questions' tokens; ValueError or OSError, in one sentence."""
    chosen = settings.questions
    pool = _in_languages(_pool(settings), chosen.languages)
    pool, encoded = pool.encode(tokenizer, chosen.max_prompt_tokens)
    room = settings.fleet.max_model_len
    for name, tokens in encoded.items():
        whole = len(tokens.prompt_ids) + len(tokens.answer_ids)
        if whole >= room:  # engines make one token behind a text that they score
            raise ValueError(
                f"question {name} and its answer have {whole} tokens, which with one more is more than "
                f"fleet.max_model_len ({room}); raise it or lower questions.max_prompt_tokens"
            )
    if settings.episodes.prompts > len(pool.train):
        raise ValueError(
            f"episodes.prompts is {settings.episodes.prompts}, but the pool has {len(pool.train)} questions "
            f"to train on; lower it or add sources"
        )
    if not pool.heldout:
        raise ValueError(
            "the pool holds no question out; raise questions.heldout_frac or add sources"
        )
    return RolloutPlan(settings, pool, encoded)


def _pool(settings: PPOSettings) -> QuestionPool:
    chosen = settings.questions
    if len(chosen.sources) == 1 and (Path(chosen.sources[0]) / "manifest.json").is_file():
        return QuestionPool.read(Path(chosen.sources[0]))
    config = PoolConfig(
        answer_format=chosen.answer_format, heldout_frac=chosen.heldout_frac, seed=settings.seed,
        carve_out=chosen.carve_out,
    )  # fmt: skip
    if not chosen.sources:
        return default_pool(chosen.against, config)
    return build_pool(chosen.sources, chosen.against, config)


def _in_languages(pool: QuestionPool, languages: Sequence[str]) -> QuestionPool:
    train, heldout = (
        tuple(q for q in part if q.language in languages) for part in (pool.train, pool.heldout)
    )
    if not train:
        raise ValueError(f"the pool has no question in {', '.join(languages)}; change questions.languages")  # fmt: skip
    return dataclasses.replace(pool, train=train, heldout=heldout)


def _overrides(options: argparse.Namespace) -> list[str]:
    short = [
        f"{key}={getattr(options, name)}"
        for name, key in _SHORT.items()
        if getattr(options, name) is not None
    ]
    return [*short, *options.set]


def _resumed(options: argparse.Namespace) -> tuple[PPOSettings, RunFolder]:
    named = [name for name in ("config", "out", *_SHORT) if getattr(options, name) is not None]
    if named:
        raise ValueError(f"--resume goes on with the run's own settings; leave --{named[0]} away")
    run = RunFolder.existing(options.resume)
    _RESUMPTION.check_overrides(options.set)
    return load_settings(PPOSettings, str(run.path / "config.yaml"), _overrides(options)), run


def describe(request: Request) -> str:
    """What the run will take, as a table; nothing is started for it."""
    settings, pool, config = request.settings, request.plan.pool, request.config
    episodes, reward, fleet = settings.episodes, settings.learner.reward, settings.fleet
    made = episodes.prompts * episodes.samples
    longest = max(len(e.prompt_ids) + len(e.answer_ids) for e in request.plan.encoded.values())
    epochs = settings.steps * episodes.prompts / len(pool.train)
    lines = [
        ("model", f"{settings.model}: {config.layer_count} layers, {len(config.protected_layers)} never skip"),
        ("questions", f"{len(pool.train)} to train on, {len(pool.heldout)} held out; at most {longest} tokens"),
        ("step", f"{episodes.prompts} questions x {episodes.samples} samples = {made} episodes"),
        ("episode", f"at most {episodes.max_new_tokens} tokens by the {episodes.sampled_by} model, then the answer"),
        ("run", f"{settings.steps} steps = {made * settings.steps:,} episodes, {epochs:.2f} epochs"),
        ("reward", f"{reward.beta} x compute saved - {reward.lam} x NLL increase ({reward.quality})"),
        ("engines", f"{fleet.engines} x {fleet.threads_per_engine} threads, {fleet.device}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def settings_tree(settings: PPOSettings) -> dict[str, Any]:
    """As config.yaml holds them: plain words and numbers."""
    return _plain(to_tree(settings))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, str) else value


def _parser(description: str) -> OptionParser:
    parser = run_parser("ppo", description, "episodes.samples=8")
    parser.add_argument("--beta", type=float, help="weight of saved compute in the reward (0.1)")
    parser.add_argument("--lam", type=float, help="weight of the NLL increase in the reward (0.1)")
    model = "FBS folder, or a backbone to be given gates (smollm2-135m)"
    parser.add_argument("--model", help=model)
    parser.add_argument("--steps", type=int, help="updates")
    return parser
