"""python -m fbs_rl.bench latency | batch | overhead | table: the paper's latency protocol (appendix B.3 to B.5).

latency: one row, every way of decoding side by side. batch: 1, 4 and 8 rows, which skip the same layers.
overhead: what the modules cost when nothing is skipped. table: saved results as one Markdown table.

A request is a prompt of 512 tokens and 128 forced steps: what is fed does not depend on what a model says.
20 warm-ups, 50 runs, variants in turns, CUDA events, medians; stopped by a signal it shows what the rounds so
far gave. Shares of skipped layers are forced: gates are computed in full, but answer what gives the share, so no
quality is implied; with --tau the gates decide. With --geometry weights are random: latency alone. vLLM (engines
vllm, vllm-fbs) takes its turns in processes of its own and by the host's clock; see latency_vllm.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from fbs_rl.interruption import Interruption
from fbs_rl.latency_engines import Engine, OwnClock, Variant, Workload, make_engine
from fbs_rl.latency_figures import draw_steps, make_figures, markdown_table
from fbs_rl.latency_protocol import copy_bandwidth, describe_device, measure
from fbs_rl.latency_vllm import PLUGIN, STOCK, VLLMOptions, VLLMProcesses, start
from fbs_rl.model.backbone import SMOLLM2, ModelSource, load_backbone
from fbs_rl.model.configuration import PRESETS, FBSConfig
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model_geometry import GEOMETRIES, random_backbone
from fbs_rl.types import GateMode

_BATCHES = {"latency": "1", "batch": "1,4,8", "overhead": "1"}
ENGINES = ("transformers", "incremental", "graph", STOCK, PLUGIN)


def main(argv: list[str]) -> int:
    """Runs a subcommand; exit code 2, with one sentence, for settings that cannot work."""
    arguments = parse(argv)
    try:
        if arguments.what == "table":
            print(_saved_table(arguments.files))
            return 0
        # Libraries that are imported on the way print to where the result goes.
        with redirect_stdout(sys.stderr):
            result = run(arguments, lambda so_far: _save(so_far, arguments.out, arguments.what))
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if arguments.json else describe(result))
    return 0


def run(
    arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measure all batches; `keep` is given the result as it is after each.

    Raises ValueError or OSError for settings that cannot work.
    """
    device, dtype = _device(arguments.device), getattr(torch, arguments.dtype)
    own = "graph" if device.type == "cuda" else "incremental"
    named: str = arguments.engines or f"transformers,{own}"
    variants = choose_variants(arguments.what, named.split(","), arguments)
    batches = [int(word) for word in (arguments.batches or _BATCHES[arguments.what]).split(",")]
    plain, models = load_models(arguments, dtype, device)
    bandwidth = copy_bandwidth(device)
    most = Workload(max(batches), arguments.prompt_tokens, arguments.new_tokens)
    served = list(dict.fromkeys(v.engine for v in variants if v.engine in (STOCK, PLUGIN)))
    options = VLLMOptions(dtype, device, _overrides(arguments.vllm), _overrides(arguments.serving))
    with start(served, plain, models[True], most, options) as processes:
        result: dict[str, Any] = {
            "settings": {k: v for k, v in vars(arguments).items() if k != "files"},
            "host": describe_device(device) | {"copy_bytes_per_s": bandwidth},
            "vllm": {name: dataclasses.asdict(facts) for name, facts in processes.facts.items()},
            "random_weights": arguments.geometry is not None,
            "rows": [],
        }
        interruption = Interruption()
        for batch in batches:
            load = dataclasses.replace(most, rows=batch)
            makers = {v.name: _maker(v, load, plain, models, processes) for v in variants}
            with interruption.awaited():
                result["rows"] += _measured(
                    variants, makers, load, bandwidth, plain, interruption, arguments
                )
            keep(result)
            if interruption.asked:
                break
    return result


def _maker(
    variant: Variant, load: Workload, plain: Any, models: dict[bool, FBSForCausalLM], processes: VLLMProcesses
) -> Callable[[], Engine | OwnClock]:  # fmt: skip
    model = models[variant.modules]
    if variant.engine in processes.channels:
        return lambda: processes.engine(variant, model.config, load)
    return lambda: make_engine(variant, model, plain, load, None)


def _measured(
    variants: Sequence[Variant], makers: dict[str, Callable[[], Engine | OwnClock]], load: Workload,
    bandwidth: float, plain: Any, interruption: Interruption, arguments: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one batch size. plain: the backbone."""
    found = measure(
        makers, load, arguments.warmups, arguments.runs, plain.config.vocab_size, plain.device,
        _progress(load.rows), lambda: interruption.asked,
    )  # fmt: skip
    samples = {variant.name: found[variant.name][1] for variant in variants}
    stock = next((samples[v.name] for v in variants if v.engine == STOCK), None)
    rows = []
    for variant in variants:
        engine, sample = found[variant.name]
        figures = make_figures(
            variant, engine, sample, samples[variants[0].name], load, bandwidth, plain.dtype.itemsize, stock
        )  # fmt: skip
        log = {
            "entropy_T": None if sample.entropy_T is None else sample.entropy_T.tolist(),
            "step_ms_T": torch.from_numpy(sample.step_RT).median(0).values.tolist(),
        }
        rows.append(dataclasses.asdict(figures) | {"runs": len(sample.prefill_R), "tokens": log})
    return rows


def choose_variants(
    what: str, engines: Sequence[str], arguments: argparse.Namespace
) -> list[Variant]:
    """The variants of a subcommand, the one that others are held against first."""
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown:
        raise ValueError(f"no engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    share, tau = arguments.skip, arguments.tau
    threshold, sample = GateMode.THRESHOLD, GateMode.SAMPLE
    found: list[Variant] = []
    for engine in engines:
        if engine == "transformers":
            found.append(Variant(engine, engine, modules=False))
            continue
        if engine == STOCK:
            found.append(Variant(f"{engine}, dense", engine, modules=False))
            continue
        if engine != PLUGIN:
            found.append(Variant(f"{engine}, plain", engine, modules=False))
        elif what != "overhead":  # which has it under another name
            found.append(Variant(f"{engine}, dense", engine, modules=True))
        if what == "overhead":
            found += [
                Variant(f"{engine}, modules, no gates", engine, True),
                Variant(f"{engine}, gates on, nothing skipped", engine, True, threshold, 0.0),
                Variant(f"{engine}, gates drawn, nothing skipped", engine, True, sample, 0.0),
            ]
        elif tau is not None:
            found.append(Variant(f"{engine}, tau {tau:g}", engine, True, threshold, None, tau))
        else:
            found.append(Variant(f"{engine}, {share:.0%} forced", engine, True, threshold, share))
        if what == "latency" and tau is None:
            found.append(Variant(f"{engine}, {share:.0%} drawn", engine, True, sample, share))
    preferred = [v for v in found if v.name == "graph, plain"] or found[:1]
    return preferred + [v for v in found if v is not preferred[0]]


def load_models(
    arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[Any, dict[bool, FBSForCausalLM]]:
    """(the backbone, FBS models without and with modules), all on the same weights."""
    config = FBSConfig.preset(arguments.preset, **_overrides(arguments.set))
    plain: Any
    if arguments.geometry is not None:
        plain = random_backbone(arguments.geometry, dtype, device)
    else:
        plain = load_backbone(ModelSource.parse(arguments.model), dtype)
        plain = plain.to(device)
    without = FBSForCausalLM.from_backbone(plain, FBSConfig(paw=False, chunk=False, gate=False))
    return plain, {False: without, True: FBSForCausalLM.from_backbone(plain, config)}


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    """OPTION=VALUE, values read as YAML."""
    return {word.partition("=")[0]: yaml.safe_load(word.partition("=")[2]) for word in words}


def _device(word: str | None) -> torch.device:
    if word is None:
        word = "cuda" if torch.cuda.is_available() else "cpu"
    if word == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and there is no CUDA device; leave it out")
    return torch.device(word)


def _progress(batch: int) -> Any:
    def say(text: str) -> None:
        print(f"\rbatch {batch}: {text}   ", end="", file=sys.stderr, flush=True)

    return say


def describe(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, host = result["settings"], result["host"]
    source = settings["geometry"] or settings["model"]
    random = " with random weights (latency only)" if result["random_weights"] else ""
    engines = [
        f"{name} is vLLM {it['vllm']}, compilation {it['compilation']}, CUDA graphs {it['cuda_graphs']}; "
        for name, it in result.get("vllm", {}).items()
    ]
    return (
        f"{source}{random}, preset {settings['preset']}, {settings['dtype']}, "
        f"{settings['prompt_tokens']} -> {settings['new_tokens']} forced tokens, {settings['warmups']} warm-ups, "
        f"{_runs(result)}, interleaved; {''.join(engines)}{host['device']}, torch {host['torch']}, "
        f"copy bandwidth {host['copy_bytes_per_s'] / 1e12:.3g} TB/s\n\n{markdown_table(result['rows'])}"
    )


def _runs(result: dict[str, Any]) -> str:
    wanted = result["settings"]["runs"]
    kept = min(row.get("runs", wanted) for row in result["rows"])  # older files do not say
    return (
        f"{wanted} runs" if kept == wanted else f"stopped by a signal after {kept} of {wanted} runs"
    )


def _save(result: dict[str, Any], out: str | None, what: str) -> None:
    """WHAT.json, WHAT.md and WHAT.png in the folder `out`, if one is wanted."""
    if out is None:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{what}.json").write_text(json.dumps(result))
    (folder / f"{what}.md").write_text(describe(result) + "\n")
    draw_steps(result["rows"], folder / f"{what}.png")


def _saved_table(files: list[str]) -> str:
    if not files:
        raise ValueError("table needs files that `latency`, `batch` or `overhead` saved with --out")
    return "\n\n".join(describe(json.loads(Path(name).read_text())) for name in files)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The settings that these words of a command line give."""
    return _parser().parse_args(list(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fbs_rl.bench", description=__doc__)
    parser.add_argument("what", choices=[*_BATCHES, "table"])
    parser.add_argument("files", nargs="*", help="of table: saved JSON")
    parser.add_argument("--model", default=SMOLLM2, help="hub id, folder, .gguf or smollm2-135m")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), help="random weights, this shape")
    parser.add_argument("--preset", default="default", help=f"of {', '.join(sorted(PRESETS))}")
    parser.add_argument("--set", metavar="OPTION=VALUE", nargs="*", default=[])
    parser.add_argument(
        "--engines",
        help=f"of {', '.join(ENGINES)} (default: transformers, and graph where there is CUDA)",
    )
    parser.add_argument(
        "--vllm", metavar="OPTION=VALUE", nargs="*", default=[], help="of vllm.LLM, for both of its engines"
    )  # fmt: skip
    parser.add_argument(
        "--serving", metavar="OPTION=VALUE", nargs="*", default=[], help="settings of the plugin, for vllm-fbs"
    )  # fmt: skip
    parser.add_argument("--skip", type=float, default=0.36, help="share of all layers, forced")
    parser.add_argument("--tau", type=float, help="let the gates decide, at this threshold")
    parser.add_argument("--batches", help="rows, as in 1,4,8")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--warmups", type=int, default=20)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--out", help="folder for JSON, Markdown and a plot")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser
