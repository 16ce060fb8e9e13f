"""python -m fbs_rl.data prepare INPUT... --out DIR: from raw text to packed training shards.

python -m fbs_rl.data bench INPUT...: how fast this machine does it, and how many near-duplicates it finds.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from typing import Any

from fbs_rl.data.prepare_config import PrepareConfig, read_config
from fbs_rl.option_parser import OptionParser

_FLAGS = {
    "tokenizer": "tokenizer",
    "sequence_tokens": "sequence_tokens",
    "languages": "filters.languages",
    "near_duplicate_threshold": "near_duplicates.threshold",
    "decontaminate": "decontamination.files",
    "lexicon": "labels.lexicon",
    "heldout_frac": "heldout_frac",
    "seed": "seed",
}
"""Options of the command line that set a key of the configuration."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ValueError in one sentence for one that cannot work."""
    parser = OptionParser(
        prog="python -m fbs_rl.data",
        description="Prepare text for training: filtered, without duplicates, labelled, packed.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands.add_parser("prepare", help="make shards", allow_abbrev=False))
    _add_bench(commands.add_parser("bench", help="measure the stages", allow_abbrev=False))
    return parser.parse_args(argv)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    words = "file (.jsonl, .parquet, .txt, .md; .gz or .zst after it), folder, pattern, or hf:OWNER/NAME"
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=words)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the shards go")
    parser.add_argument("--config", metavar="FILE", help="YAML; see configs/data_default.yaml")
    set_help = "any key of the configuration, such as filters.min_chars=500"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    common = parser.add_argument_group("the usual settings")
    common.add_argument("--tokenizer", metavar="NAME", help="hub id, folder or smollm2-135m")
    common.add_argument("--sequence-tokens", type=int, metavar="N", help="default 2048")
    common.add_argument("--languages", metavar="LIST", help="of en, zh, mixed; default all")
    near = "Jaccard similarity; default 0.8; null: exact duplicates only"
    common.add_argument("--near-duplicate-threshold", metavar="J", help=near)
    benchmark = "benchmark (or pattern) whose text must not be in the shards; repeatable"
    common.add_argument("--decontaminate", action="append", metavar="FILE", help=benchmark)
    common.add_argument("--lexicon", metavar="FILE", help="idioms, one a line")
    common.add_argument("--heldout-frac", metavar="X", help="default 0.005")
    common.add_argument("--seed", metavar="N", help="order of documents; default 0")
    work = parser.add_argument_group("how the work is done; nothing in the result depends on it")
    count = "processes, default 1; with --ray tasks at a time, default all CPUs"
    work.add_argument("--workers", type=int, metavar="N", help=count)
    work.add_argument("--ray", action="store_true", help="run the tasks on a Ray cluster")
    address = 'of the cluster; default: the one found; "local" starts one here'
    work.add_argument("--ray-address", metavar="ADDRESS", help=address)
    work.add_argument("--keep-work", action="store_true", help="leave intermediate results")
    work.add_argument("--dry-run", action="store_true", help="inputs, sizes, estimates; no work")
    work.add_argument("--verbose", action="store_true", help="show errors with their traceback")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="as for prepare")
    parser.add_argument("--tokenizer", default="smollm2-135m", metavar="NAME")
    parser.add_argument("--sequence-tokens", type=int, default=512, metavar="N")
    cleaned = "text of each language that is cleaned; default 50"
    parser.add_argument("--clean-mb", type=float, default=50.0, metavar="X", help=cleaned)
    encoded = "text of each language that is tokenised and labelled; default 8"
    parser.add_argument("--encode-mb", type=float, default=8.0, metavar="X", help=encoded)
    planted = "documents of each language that near-duplicates are planted among; default 1000"
    parser.add_argument("--planted", type=int, default=1000, metavar="N", help=planted)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show errors with their traceback")


def config_of(options: argparse.Namespace) -> PrepareConfig:
    """Defaults, then the file, then flags, then --set."""
    overrides = []
    for flag, key in _FLAGS.items():
        value: Any = getattr(options, flag)
        if value is None:
            continue
        if flag == "languages":
            value = value.split(",")
        quoted = (
            value
            if flag in ("heldout_frac", "seed", "near_duplicate_threshold")
            else json.dumps(value)
        )
        overrides.append(f"{key}={quoted}")
    return read_config(options.config, [*overrides, *options.set])


def run_prepare(options: argparse.Namespace) -> None:
    """Prepare, or say what would be done."""
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; give at least 1")
    if options.ray_address and not options.ray:
        raise ValueError("--ray-address needs --ray")
    config = config_of(options)
    from fbs_rl.data import prepare_report

    prepare_report.quiet_libraries()
    prepare_report.run(config, options)


def run_bench(options: argparse.Namespace) -> None:
    """Measure."""
    from fbs_rl.data import prepare_bench, prepare_report

    prepare_report.quiet_libraries()
    prepare_bench.run(options)


def sentence(error: Exception) -> str:
    """What to tell the user, in one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command to continue"
    if isinstance(error, PermissionError) and error.filename:
        return f"no permission for {error.filename}; change it or name another place"
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 2 with one sentence for what a user can put right, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options = parse(words)
        {"prepare": run_prepare, "bench": run_bench}[options.command](options)
    except (ValueError, OSError) as error:  # FileNotFoundError and ChildProcessError are OSErrors
        if "--verbose" in words:
            raise
        print(sentence(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
