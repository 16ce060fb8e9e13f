"""python -m fbs_rl.quickstart (`make run`): SmolLM2-135M becomes an FBS model, and what skipping costs it is measured.

Gates and skip adapters are fitted in closed form to text that the project ships (no training yet), the
threshold is calibrated to a few skip ratios, and perplexity on held-out text is compared with random
gates and with dropping fixed layers, all with the same adapters.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor

from fbs_rl.checkpoint import LoadedModel, load_model, save_gates
from fbs_rl.data.samples import load_sample
from fbs_rl.data.sequences import cut_sequences
from fbs_rl.model.backbone import SMOLLM2
from fbs_rl.model.baselines import random_skip, removal_harm, static_skip
from fbs_rl.model.calibration import SkipQuality, calibrate_tau, measure_quality
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.gate_fit import fit_adapters, fit_gates
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.run_folder import RunFolder

LANGUAGES = {"en": "English", "zh": "Chinese"}


@dataclass(frozen=True, slots=True)
class Texts:
    """Token sequences [N, T]: fit, and held-out ones by language."""

    fit_NT: Tensor
    heldout: dict[str, Tensor]
    decode_start: int


@dataclass(slots=True)
class Comparison:
    """Quality by (variant, asked ratio) and language."""

    rows: dict[tuple[str, float], dict[str, SkipQuality]] = field(default_factory=dict)
    taus: dict[float, float] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    console = Console(stderr=False, highlight=False)
    try:
        ratios = _ratios(options.ratios)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device is cuda, but torch finds no CUDA device here; use --device cpu"
            )
        _check_sizes(options.sequences, options.length)
        FBSConfig.preset(options.preset)
        run = RunFolder.plan("quickstart", options.out)
        console.print(f"Reading {options.model} ...")
        loaded = load_model(
            options.model, fbs=FBSConfig.preset(options.preset), dtype=torch.float32
        )
        model: Any = loaded.model
        model.to(options.device)
        texts = read_texts(loaded, options.sequences, options.length)
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    run.open("quickstart", vars(options))
    started = time.monotonic()
    order = fit(loaded.model, texts, console)
    comparison = compare(loaded.model, texts, ratios, order, console)
    _save(run, loaded, comparison, ratios, time.monotonic() - started)
    console.print(_table(comparison))
    console.print(
        f"Perplexity on {texts.decode_start}..{options.length} of held-out windows; in brackets the share of layers "
        f"skipped. Fitted on {texts.fit_NT.numel()} tokens, not trained: training is what makes skipping cheap.\n"
        f"Saved to {run.path}. Now see it skip:\n"
        f'  python -m fbs_rl.generate {run.path}/final --prompt "Why is the sky blue?" --compare-dense',
        soft_wrap=True,
    )
    return 0


def _ratios(text: str) -> list[float]:
    ratios = sorted({float(r) for r in text.split(",")})
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise ValueError(
            f"--ratios is {text}; give shares of layers between 0 and 1, as in 0.1,0.2,0.36"
        )
    return ratios


def _check_sizes(sequences: int, length: int) -> None:
    if sequences < 2 or sequences % 2 or length < 48:
        raise ValueError(
            f"{sequences} sequences of {length} tokens were asked for; "
            f"take an even number, of at least 48 tokens each"
        )


def read_texts(loaded: LoadedModel, sequences: int, length: int) -> Texts:
    """Windows of the shipped samples, half of each language; gates act after the first third."""

    def windows(language: str, split: str, count: int) -> Tensor:
        texts = [document.text for document in load_sample(language, split)]
        return cut_sequences(texts, loaded.tokenizer, length, count)

    fit_NT = torch.cat([windows(language, "train", sequences // 2) for language in LANGUAGES])
    # The last quarter of the tokens checks the fit: let it hold both languages.
    shuffled = fit_NT[torch.randperm(len(fit_NT), generator=torch.Generator().manual_seed(0))]
    heldout = {
        language: windows(language, "heldout", max(sequences // 2, 4)) for language in LANGUAGES
    }
    return Texts(shuffled, heldout, length // 3)


def fit(model: FBSForCausalLM, texts: Texts, console: Console) -> list[int]:
    """Fit adapters and gates; returns the layers in the order in which dropping them hurts least."""
    counts = torch.bincount(texts.fit_NT.flatten(), minlength=model.config.vocab_size)
    if model.model.preview is not None:
        model.model.preview.set_vocabulary(counts)
    explained = fit_adapters(model, texts.fit_NT, texts.decode_start)
    if explained:
        console.print(
            f"Skip adapters explain {sum(explained) / len(explained):.0%} of the layers' updates (unseen tokens)."
        )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Dropping each layer in turn", total=model.config.layer_count)
        harm = removal_harm(
            model, texts.fit_NT, texts.decode_start, on_layer=lambda _: progress.advance(task)
        )
    scores = fit_gates(model, texts.fit_NT, texts.decode_start, harm)
    console.print(
        f"Gates explain {sum(scores) / len(scores):.0%} of the log harm of a skip (unseen tokens, mean R²)."
    )
    mean_harm = harm.mean((1, 2)).nan_to_num(float("inf"))
    return [int(layer) for layer in mean_harm.argsort() if mean_harm[layer] < float("inf")]


def compare(
    model: FBSForCausalLM, texts: Texts, ratios: list[float], order: list[int], console: Console
) -> Comparison:
    """Held-out quality of the dense model, and at every ratio of fitted gates, random gates and dropped layers."""
    comparison = Comparison()
    config, start = model.config, texts.decode_start

    def measure(variant: str, ratio: float, gates: Callable[[Tensor], dict]) -> None:
        comparison.rows[variant, ratio] = {
            language: measure_quality(model, ids, start, **gates(ids))
            for language, ids in texts.heldout.items()
        }

    measure("dense", 0.0, lambda _: {"gates": "dense"})
    for ratio in track(ratios, "Calibrating and measuring", console=console, transient=True):
        tau = round(calibrate_tau(model, texts.fit_NT, start, ratio, steps=7), 4)
        comparison.taus[ratio] = tau
        dropped = order[: round(ratio * config.layer_count)]
        measure("fitted gates", ratio, lambda _, tau=tau: {"gates": "threshold", "tau": tau})
        measure(
            "fixed layers dropped",
            ratio,
            lambda ids, d=dropped: _replay(static_skip(config, ids, start, d)),
        )
        measure(
            "random gates", ratio, lambda ids, r=ratio: _replay(random_skip(config, ids, start, r))
        )
    return comparison


def _replay(skip_LNT: Tensor) -> dict:
    return {"gates": "replay", "skip": skip_LNT}


def _save(
    run: RunFolder, loaded: LoadedModel, comparison: Comparison, ratios: list[float], seconds: float
) -> None:
    for (variant, ratio), by_language in comparison.rows.items():
        for language, quality in by_language.items():
            record = {"variant": variant, "language": language, "asked_ratio": ratio}
            figures = {
                "skip_ratio": quality.skip_ratio,
                "perplexity": quality.perplexity,
                "tokens": quality.tokens,
            }
            run.log({f"eval/{name}": value for name, value in (record | figures).items()})
    default = ratios[len(ratios) // 2]
    loaded.model.config.gates, loaded.model.config.tau = "threshold", comparison.taus[default]
    loaded.model.save_pretrained(run.path / "final")
    loaded.tokenizer.save_pretrained(run.path / "final")
    save_gates(loaded.model, run.path / "gates")
    taus = {str(ratio): tau for ratio, tau in comparison.taus.items()}
    run.summarise(
        {"taus": taus, "saved_tau": comparison.taus[default], "seconds": round(seconds, 1)}
    )


def _table(comparison: Comparison) -> Table:
    """Perplexity, and in brackets the share of layers skipped; one block a ratio, narrow enough for 80 columns."""
    table = Table(title="Perplexity against skip ratio")
    for heading in ("layers to skip", "variant", *LANGUAGES.values()):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    last = 0.0
    for (variant, ratio), by_language in sorted(comparison.rows.items(), key=lambda row: row[0][1]):
        if ratio != last:
            table.add_section()
        cells = [f"{q.perplexity:.1f} ({q.skip_ratio:.0%})" for q in by_language.values()]
        table.add_row(
            f"{ratio:.0%}" if ratio != last or variant == "dense" else "", variant, *cells
        )
        last = ratio
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fbs_rl.quickstart", description=__doc__)
    parser.add_argument(
        "--model", default=SMOLLM2, help="hub id, folder, .gguf file or smollm2-135m"
    )
    parser.add_argument("--preset", default="default", help="default or paper")
    parser.add_argument("--ratios", default="0.1,0.2,0.36", help="shares of layers to skip")
    parser.add_argument(
        "--sequences", type=int, default=6, help="windows to fit on, half of each language"
    )
    parser.add_argument("--length", type=int, default=144, help="tokens a window")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", help="run folder (default runs/quickstart-<time>)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
