"""python -m fbs_rl.quickstart (`make run`): SmolLM2-135M becomes an FBS model, learns to skip, and is measured.

1. Text that the project ships, English and Chinese, becomes shards.
2. Skip adapters and gates are fitted to a few windows of it in closed form: a start for training.
3. Stage 1 trains for a few dozen small steps, through the same path as a large run (Ray, DeepSpeed).
4. Held-out perplexity at a few skip ratios: dense, gated before and after training, and two baselines.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fbs_rl import pretrain
from fbs_rl.checkpoint import LoadedModel, load_model
from fbs_rl.config import load_settings
from fbs_rl.data.samples import load_sample
from fbs_rl.data.sequences import cut_sequences
from fbs_rl.data.shards import write_shards
from fbs_rl.model.backbone import SMOLLM2, ModelSource, check_family
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.gate_fit import ClosedFormFit, centre_gates, fit_in_closed_form
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.run_folder import RunFolder
from fbs_rl.skip_comparison import BISECTIONS, LANGUAGES, SkipComparison, Texts
from fbs_rl.training.settings import PretrainSettings

CONFIG = "quickstart"
"""Of the training: configs/quickstart.yaml."""
_TRAIN_TOKENS = 30_000
"""Of each language that become shards; the default budget reads about a sixth of them."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    console = Console(stderr=False, highlight=False)
    try:
        ratios = _check(options)
        run = RunFolder.plan("quickstart", options.out)
        settings = training_settings(options, run.path)
        _check_model(options.model, options.preset, ratios, options.length)
        console.print(f"Reading {options.model} ...")
        loaded = load_model(
            options.model, fbs=FBSConfig.preset(options.preset), dtype=torch.float32
        )
        texts = read_texts(loaded, options.sequences, options.length)
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    if options.device == "cpu":
        # transformers looks for DeepSpeed, which would warn that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run.open("quickstart", vars(options))
    started = time.monotonic()
    comparison = SkipComparison(texts, console)
    order = before_training(run, loaded, comparison, ratios, options)
    del loaded
    gc.collect()
    code = train(run, settings, options)
    if code:
        return code
    after_training(run, comparison, ratios, order, options.device)
    _summarise(run, comparison, settings, options.length, time.monotonic() - started)
    console.print(comparison.table())
    console.print(_reading(run, settings, texts, options.length), soft_wrap=True)
    return 0


# --- what was asked ---------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> list[float]:
    """The skip ratios, if everything that was asked makes sense; ValueError, in one sentence."""
    try:
        ratios = sorted({float(r) for r in options.ratios.split(",")})
    except ValueError:
        ratios = []
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise ValueError(
            f"--ratios is {options.ratios}; give shares of layers between 0 and 1, as in 0.1,0.2,0.36"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; use --device cpu")
    if options.sequences < 2 or options.sequences % 2 or options.length < 48:
        raise ValueError(
            f"{options.sequences} sequences of {options.length} tokens were asked for; "
            f"take an even number, of at least 48 tokens each"
        )
    FBSConfig.preset(options.preset)
    return ratios


def training_settings(options: argparse.Namespace, run: Path) -> PretrainSettings:
    """Those of the training; ValueError, in one sentence, for a --set or --steps that does not fit."""
    settings = load_settings(PretrainSettings, CONFIG, _overrides(options, run))
    other = [name for name in settings.model.options if not name.startswith("loss_")]
    if other:
        raise ValueError(
            f"the quickstart's model.options can only set losses, not {other[0]}; use python -m fbs_rl.pretrain"
        )
    return settings


def _overrides(options: argparse.Namespace, run: Path) -> list[str]:
    fixed = [
        f"data={run / 'data'}",
        f"model.backbone={run / 'start'}",
        f"model.preset={options.preset}",
        "phases.gate_start=initial",  # of run/start, which is fitted
        "evaluation.skip_ratios=[]",  # measured here, by language
        f"cluster.device={options.device}",
        f"cluster.threads_per_rank={os.cpu_count() or 1}",
    ]
    steps = [] if options.steps is None else [f"phases.steps={options.steps}"]
    return [*fixed, *steps, *options.set]


def _check_model(name: str, preset: str, ratios: list[float], length: int) -> None:
    """Raise ValueError, in one sentence, for a model that cannot do what is asked; no weights are read."""
    backbone = ModelSource.parse(name).read_config()
    if isinstance(backbone, FBSConfig):
        raise ValueError(
            f"{name} is an FBS model already; give the quickstart a plain backbone, or train on with "
            f"python -m fbs_rl.pretrain --set model.backbone={name}"
        )
    check_family(backbone, name)
    config = FBSConfig.preset(preset).bound_to(backbone)
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--length is {length}, but the context of {name} is {config.max_position_embeddings} tokens"
        )
    free = 1 - len(config.protected_layers) / config.layer_count
    if ratios[-1] >= free:
        raise ValueError(
            f"--ratios names {ratios[-1]}, but only {free:.2f} of the layers of {name} may skip"
        )


def read_texts(loaded: LoadedModel, sequences: int, length: int) -> Texts:
    """Windows of the shipped samples, half of each language; gates act after the first third."""

    def windows(language: str, split: str, count: int) -> Tensor:
        texts = [document.text for document in load_sample(language, split)]
        return cut_sequences(texts, loaded.tokenizer, length, count)

    fit_NT = torch.cat([windows(language, "train", sequences // 2) for language in LANGUAGES])
    # The last quarter of the tokens checks the fit: let it hold both languages.
    shuffled = fit_NT[torch.randperm(len(fit_NT), generator=torch.Generator().manual_seed(0))]
    heldout = {language: windows(language, "heldout", max(sequences, 6)) for language in LANGUAGES}
    return Texts(shuffled, heldout, length // 3)


# --- before training --------------------------------------------------------------------------------


def before_training(
    run: RunFolder, loaded: LoadedModel, comparison: SkipComparison, ratios: list[float], options: argparse.Namespace
) -> list[int]:  # fmt: skip
    """Write the shards and the fitted model, and measure it; the order in which dropping layers hurts least."""
    console, texts = comparison.console, comparison.texts
    console.print(f"1. Shards of the shipped text: {run.path}/data")
    documents = {
        split: [text for language in LANGUAGES for text in _some_text(loaded, language, split)]
        for split in ("train", "heldout")
    }
    write_shards(
        run.path / "data", documents, loaded.tokenizer, options.length, tokenizer_name=options.model
    )
    model: Any = loaded.model
    model.to(options.device)
    console.print("2. Gates and skip adapters, fitted in closed form")
    order = fit(model, texts, console).drop_order
    with console.status("Setting a start for training ..."):
        centre_gates(model, texts.fit_NT, texts.decode_start, ratios[-1], BISECTIONS)
        model.save_pretrained(run.path / "start")
        loaded.tokenizer.save_pretrained(run.path / "start")
        comparison.add_dense("dense, before", model)
    comparison.add_gates("gates, fitted only", model, ratios)
    return order


def _some_text(loaded: LoadedModel, language: str, split: str) -> list[str]:
    """The first documents of a language, about _TRAIN_TOKENS of them, so that neither language rules."""
    texts: list[str] = []
    tokens = 0
    for document in load_sample(language, split):
        if tokens < _TRAIN_TOKENS:
            texts.append(document.text)
            tokens += len(loaded.tokenizer(document.text, add_special_tokens=False).input_ids)
    return texts


def fit(model: FBSForCausalLM, texts: Texts, console: Console) -> ClosedFormFit:
    """Fit adapters and gates, and say how well."""
    counts = torch.bincount(texts.fit_NT.flatten(), minlength=model.config.vocab_size)
    if model.model.preview is not None:
        model.model.preview.set_vocabulary(counts)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Dropping each layer in turn", total=model.config.layer_count)
        found = fit_in_closed_form(
            model, texts.fit_NT, texts.decode_start, lambda _: progress.advance(task)
        )
    if found.explained:
        share = sum(found.explained) / len(found.explained)
        console.print(f"   Adapters explain {share:.0%} of what layers add (unseen tokens).")
    console.print(
        f"   Gates explain {sum(found.scores) / len(found.scores):.0%} of the log harm of a skip "
        f"(unseen tokens, mean R²)."
    )
    return found


# --- training ---------------------------------------------------------------------------------------


def train(run: RunFolder, settings: PretrainSettings, options: argparse.Namespace) -> int:
    """Stage 1, in this process's own Ray cluster; its exit code."""
    tokens = _trained_tokens(settings, options.length)
    print(f"3. Training on {tokens:,} tokens: {run.path}/training", flush=True)
    words = ["--config", CONFIG, "--out", str(run.path / "training")]
    for override in _overrides(options, run.path):
        words += ["--set", override]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return pretrain.main(words)
    finally:
        for number, handler in handlers.items():  # Ctrl-C ends the rest at once again
            signal.signal(number, handler)


# --- after training ---------------------------------------------------------------------------------


def after_training(
    run: RunFolder, comparison: SkipComparison, ratios: list[float], order: list[int], device: str
) -> None:
    """Move the trained model to final/, measure it and its baselines, and give it a threshold."""
    console = comparison.console
    console.print(f"4. Held-out text, by language; the model is now {run.path}/final")
    final = run.path / "final"
    os.replace(run.path / "training" / "final", final)
    with console.status("Reading the trained model ..."):
        model: Any = load_model(str(final), dtype=torch.float32).model
        model.to(device)
        comparison.add_dense("dense, trained", model)
    comparison.add_gates("gates, trained", model, ratios)
    comparison.add_fixed("fixed layers, trained", model, ratios, order)
    comparison.add_random("random, trained", model, ratios)
    comparison.record(run)
    model.config.gates, model.config.tau = "threshold", comparison.taus[_default(ratios)]
    model.config.save_pretrained(final)


def _default(ratios: list[float]) -> float:
    """The ratio that final/ skips at."""
    return ratios[(len(ratios) - 1) // 2]


# --- what is left behind, what is printed -----------------------------------------------------------


def _summarise(
    run: RunFolder, comparison: SkipComparison, settings: PretrainSettings, length: int, seconds: float
) -> None:  # fmt: skip
    run.summarise(
        {
            "taus": {str(ratio): tau for ratio, tau in comparison.taus.items()},
            "saved_tau": comparison.taus[_default(sorted(comparison.taus))],
            "steps": settings.phases.steps,
            "trained_tokens": _trained_tokens(settings, length),
            "seconds": round(seconds, 1),
        }
    )


def _trained_tokens(settings: PretrainSettings, length: int) -> int:
    return settings.phases.steps * settings.batch.step_sequences * length


def _reading(run: RunFolder, settings: PretrainSettings, texts: Texts, length: int) -> str:
    windows = len(next(iter(texts.heldout.values())))
    return (
        f"Scored: tokens {texts.decode_start} to {length} of {windows} windows a language. Fitted on "
        f"{texts.fit_NT.numel():,} tokens, trained on {_trained_tokens(settings, length):,}; one seed.\n"
        f"So little shows the direction, not what FBS can do: expect some per cent of noise. Fixed and random\n"
        f"skipping use the trained model, which was not trained for them.\n"
        f"Saved to {run.path}: final/ (Hugging Face folder), training/ (the run). See it skip:\n"
        f'  python -m fbs_rl.generate {run.path}/final --prompt "Why is the sky blue?" --compare-dense'
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fbs_rl.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", default=SMOLLM2, help="hub id, folder, .gguf file or smollm2-135m"
    )
    parser.add_argument("--preset", default="default", help="default or paper")
    parser.add_argument("--ratios", default="0.2,0.36", help="shares of layers to skip")
    parser.add_argument(
        "--sequences", type=int, default=4, help="windows to fit on, half of each language"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens a window")
    parser.add_argument(
        "--steps", type=int, help="training steps (default: configs/quickstart.yaml)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", help="run folder (default runs/quickstart-<time>)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="of the training, as in batch.step_sequences=4",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
