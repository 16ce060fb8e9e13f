"""The options of `python -m fbs_rl.generate`, checked as far as that is possible without a model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fbs_rl.decode.safety import VALIDATORS, critical_layers
from fbs_rl.option_parser import OptionParser

_SEEDS = 2**63
"""Seeds are int64 in the gates' noise."""


_SPAN = re.compile(r"(first|last):(\d+)")
_RERUNS = 2


@dataclass(frozen=True, slots=True)
class NeverSkip:
    """What --never-skip names: layers (negative: from the end), and how many of the first and the last."""

    layers: tuple[int, ...] = ()
    first: int = 0
    last: int = 0

    def resolve(self, layer_count: int, model: str) -> list[int]:
        """The layers of this model. Raises ValueError if it has no such layer, or none to skip would be left."""
        outside = [i for i in self.layers if not -layer_count <= i < layer_count]
        if outside:
            raise ValueError(
                f"--never-skip names layer {outside[0]}, but {model} has layers 0 to {layer_count - 1}"
            )
        try:
            return [*self.layers, *critical_layers(layer_count, self.first, self.last)]
        except ValueError as error:
            raise ValueError(f"--never-skip: {error}") from error


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ValueError, in one sentence, if it cannot work whatever the model."""
    parser = OptionParser(
        prog="python -m fbs_rl.generate",
        description="Continue a prompt, each token shaded by how many layers it skipped.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, .gguf file or smollm2-135m")
    _add_text_options(parser)
    _add_gate_options(parser)
    _add_output_options(parser)
    options = parser.parse_args(argv)
    _check(options)
    options.reruns = _RERUNS if options.reruns is None else options.reruns
    return options


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text")
    prompt = text.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help='what to continue; "-": standard input')
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file")
    chat = "wrap the prompt in the tokenizer's chat template (default: if it has one)"
    text.add_argument("--chat", action=argparse.BooleanOptionalAction, help=chat)
    text.add_argument("--tokenizer", metavar="NAME", help="read it there instead of from MODEL")
    text.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    text.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    text.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this mass")
    text.add_argument("--seed", type=int, default=0, help="of drawn tokens; default 0")


def _add_gate_options(parser: argparse.ArgumentParser) -> None:
    gates = parser.add_argument_group("gates")
    gates.add_argument("--gates-folder", metavar="DIR", help="trained gates, from save_gates")
    gates.add_argument("--preset", metavar="NAME", help="of a backbone without gates of its own")
    mode = "what decides (default: threshold if the model has gates)"
    gates.add_argument("--mode", choices=["threshold", "sample", "dense"], help=mode)
    tau = "skip where a gate's probability is at least this (default: the model's)"
    gates.add_argument("--tau", type=float, help=tau)
    gates.add_argument("--gate-seed", type=int, help="noise of --mode sample; default 0")
    never = (
        "layers that always run: 0,1,-1 or first:2,last:6 (write =-1,0 where a minus comes first)"
    )
    gates.add_argument(
        "--never-skip", type=parse_layers, default=NeverSkip(), metavar="LAYERS", help=never
    )
    structure = "skip nothing inside brackets, quotations, JSON and code"
    gates.add_argument("--protect-structure", action="store_true", help=structure)
    check = "make the text again, skipping less, if it fails this check"
    gates.add_argument("--validate", choices=list(VALIDATORS), help=check)
    again = f"with --validate, at most so often; the last time dense (default {_RERUNS})"
    gates.add_argument("--reruns", type=int, metavar="N", help=again)
    compare = "decode without skipping too, and compare"
    gates.add_argument("--compare-dense", action="store_true", help=compare)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("machine and output")
    output.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    output.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    output.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plain = "no escape codes (as with NO_COLOR=1, or without a terminal)"
    output.add_argument("--no-color", action="store_true", help=plain)
    verbose = "let the libraries print, show errors with their traceback"
    output.add_argument("--verbose", action="store_true", help=verbose)


def parse_layers(text: str) -> NeverSkip:
    parts = text.split(",")
    spans = [(found[1], int(found[2])) for part in parts if (found := _SPAN.fullmatch(part))]
    counts = dict(spans)
    try:
        layers = tuple(int(part) for part in parts if not _SPAN.fullmatch(part))
    except ValueError:
        layers = None
    if layers is None or len(counts) < len(spans):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of layers like 0,1,-1 or first:2,last:6"
        )
    return NeverSkip(layers, counts.get("first", 0), counts.get("last", 0))


def _check(options: argparse.Namespace) -> None:
    tau, mass, noise, mode = options.tau, options.top_p, options.gate_seed, options.mode
    heat, count, again = options.temperature, options.max_new_tokens, options.reruns
    rules = [
        (tau is None or 0 <= tau <= 1, f"--tau is {tau}; a threshold on a probability lies in [0, 1]"),
        (tau is None or mode in (None, "threshold"), f"--tau is for --mode threshold, not for {mode}"),
        (noise is None or mode == "sample", "--gate-seed is for --mode sample; add that or leave it out"),
        (noise is None or 0 <= noise < _SEEDS, f"--gate-seed is {noise}; give a number from 0 to 2^63 - 1"),
        (0 <= options.seed < _SEEDS, f"--seed is {options.seed}; give a number from 0 to 2^63 - 1"),
        (count >= 1, f"--max-new-tokens is {count}; ask for at least 1"),
        (0 <= heat < float("inf"), f"--temperature is {heat}; give 0 (greedy) or more"),
        (mass is None or 0 < mass <= 1, f"--top-p is {mass}; a probability mass lies in (0, 1]"),
        (mass is None or heat > 0, "--top-p draws tokens, so it needs --temperature above 0"),
        (mode != "dense" or not options.compare_dense, "--compare-dense has nothing to compare with --mode dense"),
        (mode != "dense" or not options.protect_structure, "--protect-structure has nothing to do with --mode dense"),
        (again is None or options.validate is not None, "--reruns is for --validate; add that or leave it out"),
        (again is None or again >= 0, f"--reruns is {again}; give 0 or more"),
        (not (options.preset and options.gates_folder), "--gates-folder brings its own options; leave --preset out"),
    ]  # fmt: skip
    for holds, sentence in rules:
        if not holds:
            raise ValueError(sentence)
