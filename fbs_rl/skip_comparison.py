"""What skipping costs on held-out text: variants side by side, by skip ratio and language."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fbs_rl.model.baselines import random_skip, static_skip
from fbs_rl.model.calibration import SkipQuality, calibrate_tau, measure_quality
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.run_folder import RunFolder

LANGUAGES = {"en": "English", "zh": "Chinese"}
BISECTIONS = 6
"""Of a calibration: the threshold is found to 12/2⁶ of its logit."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Token sequences [N, T]: fit, and held-out ones by language. Gates act from decode_start on."""

    fit_NT: Tensor
    heldout: dict[str, Tensor]
    decode_start: int


@dataclass(slots=True)
class SkipComparison:
    """rows: quality by (variant, asked ratio) and language; no ratio where the model's own threshold decided.

    taus: of the gates measured last, by ratio.
    """

    texts: Texts
    console: Console
    rows: dict[tuple[str, float | None], dict[str, SkipQuality]] = field(default_factory=dict)
    taus: dict[float, float] = field(default_factory=dict)

    def add_dense(self, variant: str, model: FBSForCausalLM) -> None:
        """Nothing skipped."""
        self._add(variant, 0.0, model, lambda _: {"gates": "dense"})

    def add_gates(self, variant: str, model: FBSForCausalLM, ratios: list[float]) -> None:
        """The model's own gates, at thresholds that give the ratios on the text they were fitted on."""
        start = self.texts.decode_start
        for ratio in self._track(ratios, variant):
            found = calibrate_tau(model, self.texts.fit_NT, start, ratio, steps=BISECTIONS)
            self.taus[ratio] = tau = round(found, 4)
            self._add(variant, ratio, model, lambda _, t=tau: {"gates": "threshold", "tau": t})

    def add_own(self, variant: str, model: FBSForCausalLM) -> None:
        """The model's own gates, at the threshold that its configuration holds."""
        self._add(variant, None, model, lambda _: {"gates": "threshold"})

    def add_fixed(
        self, variant: str, model: FBSForCausalLM, ratios: list[float], order: list[int]
    ) -> None:
        """The first layers of `order` dropped, for every token."""
        start = self.texts.decode_start
        for ratio in self._track(ratios, variant):
            layers = order[: round(ratio * model.config.layer_count)]
            self._add(
                variant, ratio, model,
                lambda ids, chosen=layers: _replay(static_skip(model.config, ids, start, chosen)),
            )  # fmt: skip

    def add_random(self, variant: str, model: FBSForCausalLM, ratios: list[float]) -> None:
        """Every layer that may skip does so with one probability."""
        start = self.texts.decode_start
        for ratio in self._track(ratios, variant):
            self._add(
                variant, ratio, model, lambda ids, r=ratio: _replay(random_skip(model.config, ids, start, r))
            )  # fmt: skip

    def _add(
        self,
        variant: str,
        ratio: float | None,
        model: FBSForCausalLM,
        gates: Callable[[Tensor], dict[str, Any]],
    ) -> None:
        self.rows[variant, ratio] = {
            language: measure_quality(model, ids, self.texts.decode_start, **gates(ids))
            for language, ids in self.texts.heldout.items()
        }

    def _track(self, ratios: list[float], variant: str) -> Any:
        return track(ratios, f"Measuring: {variant}", console=self.console, transient=True)

    def record(self, run: RunFolder) -> None:
        """A line of metrics.jsonl for every row and language."""
        for (variant, ratio), by_language in self.rows.items():
            for language, quality in by_language.items():
                run.log(
                    {
                        "eval/variant": variant,
                        "eval/language": language,
                        "eval/asked_ratio": ratio,
                        "eval/skip_ratio": quality.skip_ratio,
                        "eval/perplexity": quality.perplexity,
                        "eval/tokens": quality.tokens,
                    }
                )

    def table(self) -> Table:
        """Perplexity, and in brackets the share of layers skipped; one block a ratio, within 80 columns."""
        table = Table(title="Held-out perplexity (layers skipped)")
        for heading in ("asked", "variant", *(LANGUAGES[name] for name in self.texts.heldout)):
            table.add_column(heading, justify="left" if heading == "variant" else "right")
        shown: set[str] = set()
        for (variant, ratio), by_language in sorted(self.rows.items(), key=_place):
            asked = "own" if ratio is None else f"{ratio:.0%}"
            if asked not in shown:
                table.add_section()
            cells = [f"{q.perplexity:.1f} ({q.skip_ratio:.0%})" for q in by_language.values()]
            table.add_row("" if asked in shown else asked, variant, *cells)
            shown.add(asked)
        return table


def _place(row: tuple[tuple[str, float | None], Any]) -> float:
    ratio = row[0][1]
    return math.inf if ratio is None else ratio


def _replay(skip_LNT: Tensor) -> dict[str, Any]:
    return {"gates": "replay", "skip": skip_LNT}
