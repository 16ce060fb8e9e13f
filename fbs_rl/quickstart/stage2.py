"""Stage 2 of the quickstart: PPO over the gates with vLLM rollouts, and what came of it."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from rich.table import Table

from fbs_rl import ppo
from fbs_rl.checkpoint import load_model
from fbs_rl.quickstart.request import Request
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.skip_comparison import SkipComparison

_FIGURES = (
    ("layers skipped", "eval/skip_ratio", ".1%"),
    ("compute saved, by exact FLOPs", "eval/compute_saved_frac", ".1%"),
    ("likelihood lost, nats a token", "eval/nll_increase", "+.3f"),
    ("perplexity of right answers", "eval/gold_ppl", ".2f"),
    ("reward", "eval/reward", "+.4f"),
)


def train(request: Request) -> int:
    """Stage 2 as `python -m fbs_rl.ppo` does it; its exit code. Leaves the run's final/ folder."""
    settings, folder = request.stage2, request.run.path
    print(
        f"5. Stage 2: {settings.steps} updates by PPO, {episodes(settings)} episodes of exam questions in vLLM, "
        f"layers really skipped: {folder}/stage2",
        flush=True,
    )
    code = ppo.main(request.stage2_words)
    if not code:
        os.replace(folder / "stage2" / "final", folder / "final")
    return code


def episodes(settings: PPOSettings) -> int:
    return settings.steps * settings.episodes.prompts * settings.episodes.samples


def after_training(request: Request, comparison: SkipComparison) -> None:
    """Measure the final model on the held-out text, as it will be used."""
    model: Any = load_model(str(request.run.path / "final"), dtype=torch.float32).model
    model.to(request.options.device)
    comparison.add_own("gates, after Stage 2", model)


def outcome(request: Request) -> dict[str, Any]:
    """The summary of the run: tau, and figures of held-out questions before and after."""
    path = request.run.path / "stage2" / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))


def table(found: dict[str, Any]) -> Table:
    """Held-out questions, gates deciding by threshold, before and after."""
    shown = Table(title="Held-out questions, thresholded gates")
    for heading in ("", "before Stage 2", "after"):
        shown.add_column(heading, justify="right" if heading else "left")
    for name, key, form in _FIGURES:
        shown.add_row(name, *(format(found[when][key], form) for when in ("before", "after")))
    return shown
