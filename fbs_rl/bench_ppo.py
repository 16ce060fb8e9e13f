"""python -m fbs_rl.bench ppo: what an update of Stage 2 takes, and its rollouts beside stock vLLM.

Runs the first updates of `python -m fbs_rl.ppo` with the same arguments, and throws the first one away: it starts
things up. Then stock vLLM, one engine with the same threads, continues the prompts of the same updates, each as often
as it was sampled and as far as a rollout may; the first update's prompts warm it up. Seconds are wall time on this
machine, so compare them within one output only.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fbs_rl.bench_serving import host
from fbs_rl.checkpoint import load_model
from fbs_rl.engine_processes import SETTLED, answer, environment
from fbs_rl.ppo_options import Request, describe, read_request
from fbs_rl.training.step_checkpoint import CheckpointStore

_PARTS = (
    ("dense references", "rollout/dense_s"),
    ("continuations", "rollout/self_s"),
    ("gold answers", "rollout/gold_s"),
    ("learning", "perf/update_s"),
    ("gates to the engines", "sync/sync_s"),
)
"""Of an update, with the figures that say how long it took; the rollouts' are added up over engines."""
_OF_THE_CLASS = ("model_type", "architectures", "auto_map")
_START_S, _GENERATE_S = 1200.0, 3600.0


@dataclass(frozen=True, slots=True)
class StockSpec:
    """What stock vLLM is asked for: rounds of prompts, `new_tokens` behind each."""

    folder: str
    dtype: str
    max_model_len: int
    new_tokens: int
    rounds: list[list[list[int]]]


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    as_json = "--json" in given
    try:
        with tempfile.TemporaryDirectory(prefix="fbs_bench_") as name:
            words = [w for w in given if w != "--json"]
            folder = Path(name)
            request = read_request(
                [*words, "--set", "tracking.wandb=off", "--out", str(folder / "run")],
                (__doc__ or "") + "\n--json prints everything for machines.",
            )
            if request.settings.steps < 2:
                raise ValueError("the first update only warms up; ask for --steps 2 or more")
            with redirect_stdout(sys.stderr):
                print(describe(request))
                records = updates(request)
                stock = stock_seconds(request, folder)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    result = figures(request, records, stock)
    print(json.dumps(result) if as_json else table(result))
    return 0


def updates(request: Request) -> list[dict[str, Any]]:
    """The records of all updates of the run."""
    from actors.ppo_session import open_session

    run, records = request.run, []
    run.open("bench ppo", {})
    store = CheckpointStore(run.path / "checkpoints")
    with open_session(request, store, lambda text: print(text, flush=True)) as session:
        for step in range(request.settings.steps):
            began = time.monotonic()
            episodes = session.roll(step)
            record = session.update(step, episodes) | session.sync(step + 1)
            records.append(record | {"perf/step_s": time.monotonic() - began})
            print(f"update {step + 1}: {records[-1]['perf/step_s']:.1f} s", flush=True)
    return records


# --- stock vLLM ---------------------------------------------------------------------------------------


def stock_seconds(request: Request, folder: Path) -> list[float]:
    """Seconds that stock vLLM takes for the prompts of each update."""
    settings, fleet = request.settings, request.settings.fleet
    made = request.run.path / "start"
    plain = plain_folder(str(made) if made.is_dir() else settings.model, folder / "plain")
    prompts = [
        [list(task.prompt_ids) for chunk in request.plan.chunks(step) for task in chunk for _ in task.seeds]
        for step in range(settings.steps)
    ]  # fmt: skip
    on_gpu = torch.cuda.is_available() and fleet.device != "cpu"
    dtype = {"auto": "bfloat16" if on_gpu else "float32", "fp32": "float32", "bf16": "bfloat16"}
    new_tokens = max(settings.episodes.max_new_tokens, 1)
    spec = StockSpec(plain, dtype[fleet.precision], fleet.max_model_len, new_tokens, prompts)
    ours, theirs = get_context("spawn").Pipe()
    with environment({**SETTLED, "OMP_NUM_THREADS": str(fleet.threads_per_engine)}):
        process = get_context("spawn").Process(target=serve_stock, args=(theirs, spec))
        process.start()
    theirs.close()
    try:
        answer(ours, "stock vLLM", "start", _START_S)
        return answer(ours, "stock vLLM", "generate", _GENERATE_S)
    finally:
        ours.close()
        process.join(30)
        if process.is_alive():
            process.kill()


def plain_folder(fbs: str, folder: Path) -> str:
    """A folder of the backbone alone, with the weights that the FBS model has."""
    model = load_model(fbs, dtype=torch.float32).model
    config: Any = model.config
    known, given = AutoConfig.for_model(config.backbone_type), config.to_dict()
    fields = {k: v for k, v in given.items() if k in known.to_dict() and k not in _OF_THE_CLASS}
    backbone = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.backbone_type, **fields)
    )
    kept = backbone.state_dict().keys()
    weights = {name: value for name, value in model.state_dict().items() if name in kept}
    backbone.load_state_dict(weights, strict=True)
    backbone.save_pretrained(folder)
    return str(folder)


def serve_stock(connection: Any, spec: StockSpec) -> None:
    """The process: starts the engine, then sends the seconds of every round."""
    os.dup2(2, 1)  # what vLLM prints must not be taken for the bench's own output
    try:
        from vllm import LLM, SamplingParams

        dtype: Any = spec.dtype
        llm = LLM(
            spec.folder, skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=spec.max_model_len
        )  # fmt: skip
        connection.send(None)
        params = SamplingParams(
            max_tokens=spec.new_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        seconds = []
        for prompts in spec.rounds:
            began = time.perf_counter()
            given: Any = [{"prompt_token_ids": ids} for ids in prompts]
            llm.generate(given, params, use_tqdm=False)
            seconds.append(time.perf_counter() - began)
        connection.send(seconds)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise


# --- results ------------------------------------------------------------------------------------------


def figures(
    request: Request, records: Sequence[dict[str, Any]], stock: Sequence[float]
) -> dict[str, Any]:
    """Medians over the updates behind the first one."""
    timed, settings = records[1:], request.settings
    parts = {name: _median(timed, key) for name, key in _PARTS}
    rows = settings.episodes.prompts * settings.episodes.samples
    made = rows * max(settings.episodes.max_new_tokens, 1)
    rates = [
        (r["rollout/generated_tokens"] + r["rollout/scored_tokens"]) / r["rollout/roll_s"]
        for r in timed
    ]
    return {
        "settings": {"model": settings.model, "engines": settings.fleet.engines, "episodes": rows,
                     "sampled_by": str(settings.episodes.sampled_by), "threads": settings.fleet.threads_per_engine,
                     "max_new_tokens": settings.episodes.max_new_tokens, "updates": len(timed)},
        "host": host(),
        "update_s": _median(timed, "perf/step_s"),
        "rollout_s": _median(timed, "rollout/roll_s"),
        "parts_s": parts,
        "sync_bytes": _median(timed, "sync/bytes"),
        "rollout_tokens": {
            name: _median(timed, f"rollout/{name}_tokens") for name in ("generated", "scored", "prompt", "reused")
        },
        "skip_ratio": _median(timed, "gate/skip_rate"),
        "rollout_tokens_per_s": statistics.median(rates),
        "episodes_per_s": rows / _median(timed, "rollout/roll_s"),
        "stock_tokens_per_s": statistics.median(made / s for s in stock[1:]),
        "stock_rows_per_s": statistics.median(rows / s for s in stock[1:]),
    }  # fmt: skip


def _median(records: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(float(r[key]) for r in records)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    chosen, tokens = result["settings"], result["rollout_tokens"]
    head = (
        f"{chosen['model']}, {chosen['episodes']} episodes an update, continuations of at most "
        f"{chosen['max_new_tokens']} tokens by the {chosen['sampled_by']} model, {chosen['engines']} engine(s) of "
        f"{chosen['threads']} thread(s), medians of {chosen['updates']} updates; {result['host']}"
    )
    seconds = [f"| {name} | {took:.2f} |" for name, took in result["parts_s"].items()]
    return "\n".join(
        [
            head,
            "",
            "| of an update | s |",
            "|---|---|",
            f"| whole | {result['update_s']:.2f} |",
            f"| rollouts | {result['rollout_s']:.2f} |",
            *seconds,
            "",
            f"Gates sent: {result['sync_bytes'] / 1e6:.2f} MB. Rollouts: {tokens['generated']:.0f} tokens generated, "
            f"{tokens['scored']:.0f} scored, {tokens['prompt']:.0f} read as prompts, {tokens['reused']:.0f} known "
            f"from before; {result['skip_ratio']:.1%} of layers skipped.",
            f"Generated and scored tokens a second: {result['rollout_tokens_per_s']:.1f}, "
            f"{result['episodes_per_s']:.2f} episodes a second. Stock vLLM (eager) generating for the same prompts: "
            f"{result['stock_tokens_per_s']:.1f} tokens a second, {result['stock_rows_per_s']:.2f} rows a second.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
