"""Text in the terminal, each token shaded by how many layers it skipped.

    python -m fbs_rl.generate smollm2-135m --prompt "The capital of France is" --tau 0.12 --compare-dense

torch and transformers take seconds to import, so the functions that need them import them: --help and
mistakes in the command line answer at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbs_rl import generate_report as report
from fbs_rl.decode.safety import (
    VALIDATORS,
    SafetyCounts,
    StructureGuard,
    generate_with_fallback,
    tau_ladder,
)
from fbs_rl.generate_options import parse_options
from fbs_rl.shading import Piece, PieceJoiner, color_system, shade

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fbs_rl.checkpoint import LoadedModel


@dataclass(frozen=True, slots=True)
class Job:
    """A loaded model and what to feed it.

    mode: of the run that is not the dense reference. never_skip: layers, as asked for. continues: the prompt
    and what is made are one text, which no chat template cuts.
    """

    options: argparse.Namespace
    loaded: LoadedModel
    prompt: str
    prompt_ids: list[int]
    mode: str
    never_skip: list[int]
    continues: bool


def prepare(options: argparse.Namespace) -> Job:
    """Everything before the first token.

    Raises ValueError or OSError, in one sentence, for what a user can put right: before the weights are
    read, if that can be seen by then.
    """
    prompt = read_prompt(options)
    if not options.verbose:
        quiet_libraries()
    import torch

    from fbs_rl.checkpoint import load_model, load_tokenizer
    from fbs_rl.model.backbone import ModelSource, check_family
    from fbs_rl.model.configuration import FBSConfig

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; use --device cpu")
    if options.preset is not None:
        FBSConfig.preset(options.preset)
    source = ModelSource.parse(options.model)
    # Parsing a GGUF file takes seconds each time; for one, these checks wait for the loaded model.
    if source.gguf_file is None:
        config = source.read_config()
        if not isinstance(config, FBSConfig):
            check_family(config, options.model)
        named = options.tokenizer
        tokenizer_source = source if named is None else ModelSource.parse_tokenizer(named)
        tokenizer = load_tokenizer(tokenizer_source, config.vocab_size)
        encode_prompt(options, prompt, config, tokenizer)
    loaded = load_model(
        options.model,
        options.gates_folder,
        options.preset,
        options.tokenizer,
        "auto" if options.dtype == "auto" else getattr(torch, options.dtype),
    )
    model: Any = loaded.model
    prompt_ids = encode_prompt(options, prompt, model.config, loaded.tokenizer)
    model.to(options.device)
    mode = options.mode or ("threshold" if model.config.gate else "dense")
    never_skip = protected_layers(options, model.config)
    return Job(
        options, loaded, prompt, prompt_ids, mode, never_skip, not _wraps(options, loaded.tokenizer)
    )


def read_prompt(options: argparse.Namespace) -> str:
    """The text to continue, without the line end that files and pipes close with."""
    if options.prompt_file is not None:
        path = Path(options.prompt_file)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; give --prompt-file a text file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    else:
        text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not text.strip():
        raise ValueError("the prompt is empty; give some text to continue")
    return text.removesuffix("\n")


def encode_prompt(
    options: argparse.Namespace, prompt: str, config: PreTrainedConfig, tokenizer: Any
) -> list[int]:
    """Tokens to feed first; ValueError for options that do not fit this model and tokenizer."""
    name, count = options.model, options.max_new_tokens
    context = config.max_position_embeddings
    protected_layers(options, config)
    asks = options.tau is not None or options.protect_structure
    skips = options.mode in ("threshold", "sample") or asks
    if not getattr(config, "gate", True) and (skips or options.compare_dense):
        raise ValueError(f"{name} was made without gates and skips nothing; use --mode dense alone")
    if options.chat and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {name} has no chat template; leave --chat out")
    if _wraps(options, tokenizer):
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError(f"the tokenizer of {name} finds no token in the prompt; give another one")
    if len(ids) >= context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but the model's context is {context}; shorten it"
        )
    if len(ids) + count > context:
        raise ValueError(
            f"{len(ids)} prompt tokens and --max-new-tokens {count} are more than the model's context of "
            f"{context}; ask for at most {context - len(ids)}"
        )
    return ids


def _wraps(options: argparse.Namespace, tokenizer: Any) -> bool:
    """Whether the prompt becomes a turn of a chat."""
    return bool(tokenizer.chat_template) if options.chat is None else options.chat


def protected_layers(options: argparse.Namespace, config: PreTrainedConfig) -> list[int]:
    """Layers that --never-skip names. ValueError if the model has no such layer, or none to skip is left."""
    named, count = options.never_skip, config.num_hidden_layers
    layers = named.resolve(count, options.model)
    forced = getattr(config, "forced_layers", None)  # a backbone's configuration has no gates yet
    asks = bool(named.first or named.last) and getattr(config, "gate", False)
    if asks and forced is not None and len(forced(layers)) == count:
        raise ValueError(
            f"--never-skip and the model's own protected layers leave none of its {count} layers to skip; "
            f"protect fewer"
        )
    return layers


def run(job: Job, mode: str, tau: float | None, show: Callable[[Piece], None]) -> dict[str, Any]:
    """Text, pieces and measures of one decoding; `show` gets each piece as soon as it is whole.

    tau: of mode threshold (None: the model's).
    """
    from fbs_rl.decoding import decode, end_token_ids, measures, token_chooser
    from fbs_rl.types import GateMode

    options, model = job.options, job.loaded.model
    tokenizer: Any = job.loaded.tokenizer
    settings: dict[str, Any] = {"mode": GateMode(mode)}
    if mode != "dense":
        settings |= {
            "tau": tau,
            "gate_seed": options.gate_seed or 0,
            "never_skip": job.never_skip,
        }
    # The first passes of a process are slow: they are made before anything is timed.
    few = min(3, options.max_new_tokens)
    decode(model, job.prompt_ids[:8], few, token_chooser(0.0, 1.0, 0), **settings)

    def read(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    guard = None
    if options.protect_structure and mode != "dense":
        before = (job.prompt, job.prompt_ids) if job.continues else ("", [])
        guard = StructureGuard.of(read, 1, [before[0]], [before[1]])
    pieces: list[Piece] = []
    joiner = PieceJoiner(read)

    def emit(piece: Piece | None) -> None:
        if piece is not None:
            pieces.append(piece)
            show(piece)

    made = decode(
        model,
        job.prompt_ids,
        options.max_new_tokens,
        token_chooser(options.temperature, options.top_p or 1.0, options.seed),
        end_token_ids(model, tokenizer.eos_token_id),
        on_token=lambda token, skipped: emit(joiner.push(token, skipped)),
        guard=guard,
        **settings,
    )
    emit(joiner.flush())
    result = {"text": "".join(p.text for p in pieces), "pieces": [asdict(p) for p in pieces]}
    if mode == "threshold":
        result["tau"] = model.config.tau if tau is None else tau
    if guard is not None:
        result["protected"] = guard.kinds[0]
    return result | measures(model.config, made)


Setting = tuple[str, float | None]
"""Mode and tau of an attempt."""


def settings_ladder(job: Job) -> list[Setting]:
    """What to try in turn: as asked for, then stricter, then dense."""
    options, model = job.options, job.loaded.model
    if job.mode == "threshold":
        tau = model.config.tau if options.tau is None else options.tau
        rungs = tau_ladder(tau, options.reruns if options.validate else 0)
        return [("dense", None) if rung is None else ("threshold", rung) for rung in rungs]
    dense = options.validate and options.reruns and job.mode != "dense"
    return [(job.mode, None), ("dense", None)] if dense else [(job.mode, None)]


def run_safely(job: Job, make: Callable[[str, float | None], dict[str, Any]]) -> dict[str, Any]:
    """ "run", the one to keep, and, where a guard was asked for, "safety": all attempts and the counts.

    make: one decoding with a mode and a tau.
    """
    options = job.options
    check = VALIDATORS[options.validate] if options.validate else lambda text: None

    def generate(setting: Setting) -> tuple[dict[str, Any], str, int]:
        made = make(*setting)
        text = job.prompt + made["text"] if job.continues else made["text"]
        return made, text, made["flops"]["executed"] if made["flops"] else 0

    found = generate_with_fallback(generate, settings_ladder(job), check)
    result: dict[str, Any] = {"run": found.kept.made}
    if not (options.protect_structure or options.validate):
        return result
    runs = [attempt.made for attempt in found.attempts]
    kinds = [kind for made in runs for kind in made.get("protected", [None] * made["steps"])]
    counts = SafetyCounts.of(kinds, [attempt.error for attempt in found.attempts])
    attempts = [
        {"mode": a.setting[0], "tau": a.setting[1], "error": a.error, "flops": a.flops}
        | {name: a.made[name] for name in ("text", "stop", "steps", "skip_ratio")}
        for a in found.attempts
    ]
    result["safety"] = {
        "protect_structure": options.protect_structure,
        "validator": options.validate,
        "attempts": attempts,
        "executed_flops": found.flops,
        "metrics": counts.metrics(),
    }
    return result


def print_json(job: Job) -> None:
    """One object on standard output, in ASCII, which every encoding carries."""
    from fbs_rl.decoding import comparison

    def silent(mode: str, tau: float | None) -> dict[str, Any]:
        return run(job, mode, tau, lambda piece: None)

    result = report.describe(job) | run_safely(job, silent)
    if job.options.compare_dense:
        result["dense"] = silent("dense", None)
        result["comparison"] = comparison(result["run"], result["dense"])
    print(json.dumps(result))


def print_text(job: Job) -> None:
    """The text as it is made, then what it cost."""
    from fbs_rl.decoding import comparison

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a question mark, not a crash, where a glyph is missing
    result, system = report.describe(job), color_system(sys.stdout, job.options.no_color)
    print(report.heading(result))

    attempts = 0

    def stream(mode: str, tau: float | None) -> dict[str, Any]:
        nonlocal attempts
        again = f"the check failed; again, {report.setting(mode, tau)}"
        print(f"\n{again if attempts else report.TITLES[mode]}:")
        attempts += 1
        layers, colours = result["layers"], None if mode == "dense" else system
        made = run(job, mode, tau, lambda p: print(shade(p, layers, colours), end="", flush=True))
        print()
        return made

    result |= run_safely(job, stream)
    attempts = 0
    if job.options.compare_dense:
        result["dense"] = stream("dense", None)
        result["comparison"] = comparison(result["run"], result["dense"])
    print("\n" + report.summary(result, system))


def quiet_libraries() -> None:
    """No progress bars and no warnings from transformers and what it uses."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one sentence on standard error for what a user can put right."""
    words = sys.argv[1:] if argv is None else argv
    try:
        options = parse_options(words)
        job = prepare(options)
    except (ValueError, OSError) as error:  # FileNotFoundError is an OSError
        if "--verbose" in words:
            raise
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    if not job.loaded.trained and job.mode != "dense":
        print(report.UNTRAINED, file=sys.stderr if options.json else sys.stdout)
    try:
        (print_json if options.json else print_text)(job)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
