"""python -m fbs_rl.bench decode: time per decoding step on this machine, dense against skipping.

`python -m fbs_rl.bench train` is in bench_train.py, `vllm` in bench_serving.py, `ppo` in bench_ppo.py, `latency`,
`batch`, `overhead` and `table` in bench_latency.py, `calls` in bench_calls.py.

All variants run in one process and take turns, one step each, so that a busy machine slows them alike;
figures are medians, and ratios are of medians. Forced rates: the gates are computed in full, but their
last layer is set to give one constant probability, so that the measured skip ratio is the one asked for
and no quality is implied.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import yaml
from torch import Tensor

from fbs_rl.model.backbone import SMOLLM2, ModelSource, load_backbone
from fbs_rl.model.configuration import PRESETS, FBSConfig
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    context: tokens before the steps. ms_p50, ms_p95: per step. speedup: the dense median of the same batch over it.
    """

    preset: str
    batch: int
    context: int
    variant: str
    skip_ratio: float
    ms_p50: float
    ms_p95: float
    speedup: float


Step = Callable[[], float]
"""Runs one decoding step and returns the share of (row, layer) pairs that were skipped."""


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["train"]:
        from fbs_rl.bench_train import main as train

        return train(given[1:])
    if given[:1] == ["vllm"]:
        from fbs_rl.bench_serving import main as serving

        return serving(given[1:])
    if given[:1] and given[0] in ("latency", "batch", "overhead", "table"):
        from fbs_rl.bench_latency import main as latency

        return latency(given)
    if given[:1] == ["calls"]:
        from fbs_rl.bench_calls import main as calls

        return calls(given[1:])
    if given[:1] == ["ppo"]:
        from fbs_rl.bench_ppo import main as ppo

        return ppo(given[1:])
    arguments = _parser().parse_args(given)
    try:
        _check(arguments)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    dtype = getattr(torch, arguments.dtype)
    rows = []
    if not arguments.json:
        print("\n".join(heading(arguments)), flush=True)
    for preset in arguments.presets.split(","):
        for batch, context in itertools.product(
            _numbers(arguments.batches), _numbers(arguments.prompt_tokens)
        ):
            where = f"preset {preset}, batch {batch}, behind {context} tokens"
            print(f"measuring {where} ...", file=sys.stderr, flush=True)
            found = measure(arguments.model, preset, batch, context, arguments, dtype)
            if not arguments.json:  # as they come: the whole takes minutes
                print("\n".join(line(row) for row in found), flush=True)
            rows += found
    if arguments.json:
        print(
            json.dumps(
                {"settings": vars(arguments), "host": _host(), "rows": [asdict(r) for r in rows]}
            )
        )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError, in one sentence, for settings that cannot be measured."""
    if not 0 <= arguments.skip < 1:
        raise ValueError(f"--skip is {arguments.skip}; give a share of layers in [0, 1)")
    for preset in arguments.presets.split(","):
        FBSConfig.preset(preset, **_overrides(arguments.set))
    for option, example in (("batches", "1,8"), ("prompt_tokens", "128,2048")):
        given = getattr(arguments, option)
        if not all(n.isdigit() and int(n) > 0 for n in given.split(",")):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is {given}; give whole numbers above 0, as in {example}")
    if arguments.steps < 2:
        raise ValueError(f"--steps is {arguments.steps}; it must be at least 2")
    ModelSource.parse(arguments.model)


def _numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def measure(
    name: str, preset: str, batch: int, context: int, arguments: argparse.Namespace, dtype: torch.dtype
) -> list[Row]:  # fmt: skip
    """Rows of one preset, batch size and context, the dense FBS model first."""
    backbone = load_backbone(ModelSource.parse(name), dtype)
    model = FBSForCausalLM.from_backbone(
        backbone, FBSConfig.preset(preset, **_overrides(arguments.set))
    )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator)
    token = prompt[:, -1:]
    hold_probability(model, arguments.skip)
    alike, apart = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
    with torch.inference_mode():
        read = FBSCache(model.config.layer_count)  # a prompt skips nothing: it is read once for all
        model(prompt, past_key_values=read, logits_to_keep=1, gates="dense")
        modes = {
            "dense": {"gates": "dense"},
            "gates on, nothing skipped": {"gates": "threshold", "tau": 1.0},
            "skipping": {"gates": "sample", "gate_seed": apart},
        }
        if batch > 1:
            modes["skipping, rows agree"] = {"gates": "sample", "gate_seed": alike}
        steps = {name: _fbs_step(model, read, token, gates) for name, gates in modes.items()}
        plain = load_backbone(ModelSource.parse(name), dtype)
        steps["plain transformers"] = _plain_step(plain, prompt, token)
        times, skips = _interleave(steps, arguments.warmup, arguments.steps)
    base = statistics.median(times["dense"])
    return [
        Row(
            preset,
            batch,
            context,
            variant,
            statistics.fmean(skips[variant]),
            1e3 * statistics.median(seconds),
            1e3 * statistics.quantiles(seconds, n=20)[-1],
            base / statistics.median(seconds),
        )
        for variant, seconds in times.items()
    ]


def hold_probability(model: FBSForCausalLM, share: float) -> None:
    """Make every gate answer one probability, such that `share` of all layers is skipped on average."""
    free = model.config.layer_count - len(model.config.protected_layers)
    prob = torch.tensor(min(share * model.config.layer_count / free, 0.99))
    with torch.no_grad():
        for layer in model.model.fbs_layers():
            if layer.skip_gate is not None:
                layer.skip_gate.out.weight.zero_()
                layer.skip_gate.out.bias.fill_(float(torch.logit(prob)))


def _overrides(words: list[str]) -> dict:
    """FBSConfig options from OPTION=VALUE words, values as YAML reads them."""
    return {word.partition("=")[0]: yaml.safe_load(word.partition("=")[2]) for word in words}


def _fbs_step(model: FBSForCausalLM, read: FBSCache, token: Tensor, gates: dict) -> Step:
    """A step behind what `read` holds, which stays as it is."""
    cache = copy.deepcopy(read)

    def step() -> float:
        out = model(token, past_key_values=cache, **gates)
        return float(out.skip.float().mean())

    return step


def _plain_step(model: torch.nn.Module, prompt: Tensor, token: Tensor) -> Step:
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def step() -> float:
        model(token, past_key_values=cache, use_cache=True)
        return 0.0

    return step


def _interleave(
    steps: dict[str, Step], warmup: int, count: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and skip shares per variant; the variants take turns, in a new order each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    skips: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(warmup + count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            skipped = steps[name]()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
                skips[name].append(skipped)
    return seconds, skips


def heading(arguments: argparse.Namespace) -> list[str]:
    """What is measured, and the head of a Markdown table of its rows."""
    return [
        f"{arguments.model}, {arguments.dtype}, {arguments.steps} steps each, interleaved"
        f"{_said(arguments.set)}; {_host()}",
        "",
        "| preset | batch | context | variant | layers skipped | ms/step p50 | p95 | tokens/s | dense / this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def line(r: Row) -> str:
    """One row of the table."""
    return (
        f"| {r.preset} | {r.batch} | {r.context} | {r.variant} | {r.skip_ratio:.1%} | {r.ms_p50:.1f} "
        f"| {r.ms_p95:.1f} | {1e3 * r.batch / r.ms_p50:.1f} | {r.speedup:.2f} |"
    )


def _said(words: list[str]) -> str:
    return f", {' '.join(words)}" if words else ""


def _host() -> str:
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fbs_rl.bench", description=__doc__)
    parser.add_argument("what", choices=["decode"], nargs="?", default="decode")
    parser.add_argument(
        "--model", default=SMOLLM2, help="hub id, folder, .gguf file or smollm2-135m"
    )
    parser.add_argument(
        "--presets", default="default,paper", help=f"of {', '.join(sorted(PRESETS))}"
    )
    parser.add_argument(
        "--set",
        metavar="OPTION=VALUE",
        nargs="*",
        default=[],
        help="FBSConfig options over the preset",
    )
    parser.add_argument("--batches", default="1,8")
    parser.add_argument(
        "--skip", type=float, default=0.36, help="share of all layers to skip (default 0.36)"
    )
    parser.add_argument(
        "--prompt-tokens", default="128,2048", help="tokens before the steps (default 128,2048)"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
