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
from fbs_rl.generate_options import parse_options
from fbs_rl.shading import Piece, PieceJoiner, color_system, shade

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fbs_rl.checkpoint import LoadedModel


@dataclass(frozen=True, slots=True)
class Job:
    """A loaded model and what to feed it. mode: of the run that is not the dense reference."""

    options: argparse.Namespace
    loaded: LoadedModel
    prompt: str
    prompt_ids: list[int]
    mode: str


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
    return Job(options, loaded, prompt, prompt_ids, mode)


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
    layers, context = config.num_hidden_layers, config.max_position_embeddings
    outside = [i for i in options.never_skip if not -layers <= i < layers]
    if outside:
        raise ValueError(
            f"--never-skip names layer {outside[0]}, but {name} has layers 0 to {layers - 1}"
        )
    skips = options.mode in ("threshold", "sample") or options.tau is not None
    if not getattr(config, "gate", True) and (skips or options.compare_dense):
        raise ValueError(f"{name} was made without gates and skips nothing; use --mode dense alone")
    template = bool(tokenizer.chat_template)
    if options.chat and not template:
        raise ValueError(f"the tokenizer of {name} has no chat template; leave --chat out")
    if template if options.chat is None else options.chat:
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


def run(job: Job, mode: str, show: Callable[[Piece], None]) -> dict[str, Any]:
    """Text, pieces and measures of one decoding; `show` gets each piece as soon as it is whole."""
    from fbs_rl.decoding import decode, end_token_ids, measures, token_chooser
    from fbs_rl.types import GateMode

    options, model = job.options, job.loaded.model
    tokenizer: Any = job.loaded.tokenizer
    settings: dict[str, Any] = {"mode": GateMode(mode)}
    if mode != "dense":
        settings |= {
            "tau": options.tau,
            "gate_seed": options.gate_seed or 0,
            "never_skip": options.never_skip,
        }
    # The first passes of a process are slow: they are made before anything is timed.
    few = min(3, options.max_new_tokens)
    decode(model, job.prompt_ids[:8], few, token_chooser(0.0, 1.0, 0), **settings)

    pieces: list[Piece] = []
    joiner = PieceJoiner(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))

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
        **settings,
    )
    emit(joiner.flush())
    text = {"text": "".join(p.text for p in pieces), "pieces": [asdict(p) for p in pieces]}
    return text | measures(model.config, made)


def print_json(job: Job) -> None:
    """One object on standard output, in ASCII, which every encoding carries."""
    from fbs_rl.decoding import comparison

    result = report.describe(job)
    result["run"] = run(job, job.mode, lambda piece: None)
    if job.options.compare_dense:
        result["dense"] = run(job, "dense", lambda piece: None)
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

    def stream(mode: str) -> dict[str, Any]:
        print(f"\n{report.TITLES[mode]}:")
        layers, colours = result["layers"], None if mode == "dense" else system
        made = run(job, mode, lambda p: print(shade(p, layers, colours), end="", flush=True))
        print()
        return made

    result["run"] = stream(job.mode)
    if job.options.compare_dense:
        result["dense"] = stream("dense")
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
