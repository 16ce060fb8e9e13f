"""python -m fbs_rl.frontier: perplexity against skip ratio after Stage 1, beside plain continual pretraining.

Each arm trains the same backbone on the same tokens in the same order, in this process (one rank), and is
measured on the same held-out sequences. `plain` has no FBS modules: the dense model that the same training
would have given, which is what skipping is to be held against.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from fbs_rl.config import load_settings
from fbs_rl.data.shards import PackedShards
from fbs_rl.local_stage1 import train_here
from fbs_rl.model.baselines import random_skip, removal_harm, static_skip
from fbs_rl.model.compiled import as_written
from fbs_rl.training.batches import MicroBatch
from fbs_rl.training.evaluation import evaluate, measure
from fbs_rl.training.settings import PretrainSettings

_NO_MODULES = ("model.preset=none", "model.options={}", "phases.observe_frac=1.0")
ARMS: dict[str, tuple[str, ...]] = {
    "plain": _NO_MODULES,
    "default": ("model.preset=default",),
    "fitted": ("model.preset=default", "phases.gate_start=fitted"),
    "dense-rows": ("model.preset=default", "phases.dense_rows_frac=0.33"),
    "hardened": ("model.preset=default", "phases.harden_frac=0.25"),
    "previews-4": ("model.preset=default", "model.options.paw_layers=every:4"),
    "block-2": ("model.preset=default", "model.options.gate_block=2"),
    "block-4": ("model.preset=default", "model.options.gate_block=4"),
    "gates-here": ("model.preset=default", "model.options.gate_ahead=0"),
    "undistilled": ("model.preset=default", "model.options.loss_distill=0.0"),
    "frozen-teacher": (
        "model.preset=default",
        "phases.teacher=phase_1a",
        "phases.observe_frac=0.1",
    ),
    "paper": ("model.preset=paper", "phases.train_gated=gates", "phases.observe_frac=0.5"),
    "paper-all": ("model.preset=paper", "phases.observe_frac=0.1"),
}
"""What tells each arm from the shared settings. paper-all trains everything in phase 1b, paper the gates alone."""
_RATIOS = [0.1, 0.2, 0.3, 0.36, 0.5]
_HARM_SEQUENCES = 8


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        rows = len(PackedShards.open(arguments.data, "train"))
        settings = {name: _settings(name, arguments) for name in arguments.arms.split(",")}
    except (ValueError, OSError) as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 2
    print(f"{rows} sequences of training data", file=sys.stderr)
    for name, chosen in settings.items():
        for row in run_arm(name, chosen, bool(arguments.controls)):
            print(json.dumps(row), flush=True)
            if arguments.out:
                with Path(arguments.out).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


def run_arm(name: str, settings: PretrainSettings, controls: bool) -> list[dict[str, Any]]:
    """Train, then one row for the dense pass and one for each skip ratio; with controls also random and static."""
    began = time.perf_counter()
    trained = train_here(settings, name, _say)
    worker = trained.worker
    base = {
        "arm": name,
        "tokens": trained.tokens,
        "steps": settings.phases.steps,
        "train_s": round(trained.seconds, 1),
        "tokens_per_s": round(trained.tokens_per_s),
    }
    tuning, scored = worker.heldout_batches()
    ratios = settings.evaluation.skip_ratios
    with as_written():
        figures = evaluate(worker.model, tuning, scored, ratios, worker.reduce)
    rows = [
        {**base, "variant": "dense", "asked": 0.0, "skip": 0.0, "ppl": figures["eval/ppl_dense"]}
    ]
    for ratio in settings.evaluation.skip_ratios:
        prefix = f"eval/skip_{round(100 * ratio)}"
        if f"{prefix}/ppl" in figures:
            layers = [
                round(figures[k], 3) for k in sorted(figures) if k.startswith(f"{prefix}/layer")
            ]
            found = {"skip": figures[f"{prefix}/skip_ratio"], "ppl": figures[f"{prefix}/ppl"]}
            rows.append({**base, "variant": "gates", "asked": ratio, **found, "layers": layers})
    if controls and worker.model.config.gate:
        with as_written():
            rows += [{**base, **row} for row in _controls(worker, scored, ratios)]
    _say(f"{name}: {time.perf_counter() - began:.0f} s in all")
    return rows


def _controls(worker: Any, scored: list[MicroBatch], ratios: list[float]) -> list[dict[str, Any]]:
    """The trained model with random gates, and with fixed layers dropped, at the same skip ratios."""
    model, start = worker.model, scored[0].ids_BT.shape[1] // 4
    config, sample = model.config, scored[0].ids_BT[:_HARM_SEQUENCES]
    harm_L = removal_harm(model, sample, start).mean((1, 2)).nan_to_num(math.inf)
    order = [int(layer) for layer in harm_L.argsort() if harm_L[layer] < math.inf]
    rows = []
    for ratio in ratios:
        dropped = order[: round(ratio * config.layer_count)]
        makers = {
            "random": lambda b, r=ratio: random_skip(config, b.ids_BT.cpu(), start, r),
            "static": lambda b, d=dropped: static_skip(config, b.ids_BT.cpu(), start, d),
        }
        for variant, make in makers.items():
            tally = measure(
                model, scored, worker.reduce,
                skip_of=lambda b, m=make: m(b).to(b.ids_BT.device) & b.gated_BT, gates="replay",
            )  # fmt: skip
            skip = float(tally.skip_rate_L.mean())
            rows.append(
                {"variant": variant, "asked": ratio, "skip": skip, "ppl": math.exp(tally.loss)}
            )
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _settings(name: str, arguments: argparse.Namespace) -> PretrainSettings:
    if name not in ARMS:
        raise ValueError(f"no arm {name!r}; there are {', '.join(ARMS)}")
    shared = (
        f"data={arguments.data}",
        f"model.backbone={arguments.backbone}",
        f"evaluation.skip_ratios={_RATIOS}",
        f"evaluation.sequences={arguments.heldout}",
        "evaluation.calibration_sequences=32",
    )
    # What a model without FBS modules cannot be told is not for the plain arm.
    given = [
        o
        for o in arguments.set
        if name != "plain" or not o.startswith(("model.", "phases.observe_frac"))
    ]
    return load_settings(PretrainSettings, arguments.config, [*shared, *ARMS[name], *given])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fbs_rl.frontier", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of prepared shards")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--config", default="default", help="settings that all arms share")
    parser.add_argument("--arms", default="plain,default,paper", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--heldout", type=int, default=192, help="sequences that are scored")
    parser.add_argument(
        "--controls", action="store_true", help="also random gates and dropped layers"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", help="file that the rows are appended to, as JSON lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
