"""The options of `python -m fbs_rl.generate`, checked as far as that is possible without a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

_SEEDS = 2**63
"""Seeds are int64 in the gates' noise."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists all options")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ValueError, in one sentence, if it cannot work whatever the model."""
    parser = _Parser(
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
    never = "layers that always run, such as 0,1,-1 (write =-1,0 where a minus comes first)"
    gates.add_argument("--never-skip", type=_layers, default=[], metavar="LAYERS", help=never)
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


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers like 0,1,-1") from None


def _check(options: argparse.Namespace) -> None:
    tau, mass, noise, mode = options.tau, options.top_p, options.gate_seed, options.mode
    heat, count = options.temperature, options.max_new_tokens
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
        (not (options.preset and options.gates_folder), "--gates-folder brings its own options; leave --preset out"),
    ]  # fmt: skip
    for holds, sentence in rules:
        if not holds:
            raise ValueError(sentence)
