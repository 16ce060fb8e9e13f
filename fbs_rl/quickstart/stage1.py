"""Stage 1 of the quickstart: shards of the shipped text, a start in closed form, training, and what it gave."""

from __future__ import annotations

import signal
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fbs_rl import pretrain
from fbs_rl.checkpoint import LoadedModel, load_model
from fbs_rl.data.samples import load_sample
from fbs_rl.data.sequences import cut_sequences
from fbs_rl.data.shards import write_shards
from fbs_rl.model.gate_fit import ClosedFormFit, centre_gates, fit_in_closed_form
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.quickstart.request import Request
from fbs_rl.skip_comparison import BISECTIONS, LANGUAGES, SkipComparison, Texts

_TRAIN_TOKENS = 30_000
"""Of each language that become shards; the default budget reads about a tenth of them."""


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


def before_training(request: Request, loaded: LoadedModel, comparison: SkipComparison) -> list[int]:
    """Write the shards and the fitted model, and measure it; the order in which dropping layers hurts least."""
    console, texts, folder = comparison.console, comparison.texts, request.run.path
    console.print(f"1. Shards of the shipped text: {folder}/data")
    documents = {
        split: [text for language in LANGUAGES for text in _some_text(loaded, language, split)]
        for split in ("train", "heldout")
    }
    options = request.options
    write_shards(
        folder / "data", documents, loaded.tokenizer, options.length, tokenizer_name=options.model
    )
    model: Any = loaded.model
    model.to(options.device)
    console.print("2. Gates and skip adapters, fitted in closed form")
    order = fit(model, texts, console).drop_order
    with console.status("Setting a start for training ..."):
        share = request.stage1.phases.skip_target_start
        centre_gates(model, texts.fit_NT, texts.decode_start, share, BISECTIONS)
        model.save_pretrained(folder / "start")
        loaded.tokenizer.save_pretrained(folder / "start")
        comparison.add_dense("dense, before", model)
    comparison.add_gates("gates, fitted only", model, request.ratios)
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


def train(request: Request) -> int:
    """Stage 1 as `python -m fbs_rl.pretrain` does it; its exit code."""
    print(
        f"3. Stage 1 trains on {request.trained_tokens:,} tokens: {request.run.path}/stage1",
        flush=True,
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return pretrain.main(request.stage1_words)
    finally:
        for number, handler in handlers.items():  # Ctrl-C ends the rest at once again
            signal.signal(number, handler)


# --- after training ---------------------------------------------------------------------------------


def after_training(request: Request, comparison: SkipComparison, order: list[int]) -> None:
    """Measure the trained model and its baselines, and write a threshold into its folder."""
    console, ratios = comparison.console, request.ratios
    folder = request.run.path / "stage1" / "final"
    console.print("4. Perplexity of held-out text, by language")
    with console.status("Reading the trained model ..."):
        model: Any = load_model(str(folder), dtype=torch.float32).model
        model.to(request.options.device)
        comparison.add_dense("dense, trained", model)
    comparison.add_gates("gates, trained", model, ratios)
    comparison.add_fixed("fixed layers, trained", model, ratios, order)
    comparison.add_random("random, trained", model, ratios)
    model.config.gates, model.config.tau = "threshold", comparison.taus[request.main_ratio]
    model.config.save_pretrained(folder)
