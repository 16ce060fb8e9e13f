"""Agents beside each other: what each skips, what that saves, what it costs in likelihood, and the reward.

    python -m envs.compare --model smollm2-135m --agents never,random:0.36,static:0.36,gate,entropy --questions 4

The questions are of the sample that ships with the package, or of a pool that fbs_rl.rl.question_pool wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from envs.agents import Agent, FixedAgent, ModelGateAgent, RandomAgent, spread_layers
from envs.decode_env import DecodeEnv
from envs.encoding import MIN_ANSWER_TOKENS
from envs.entropy_agent import EntropyAgent
from envs.rollout import AgentRow, EpisodeRecord, compare_agents
from envs.settings import EnvSettings
from fbs_rl.checkpoint import load_model
from fbs_rl.option_parser import OptionParser
from fbs_rl.rl.question_pool import QuestionPool, default_pool
from fbs_rl.rl.reward import QualityTokens, RewardSettings
from fbs_rl.types import GateMode

KINDS = ("never", "random", "static", "gate", "sample", "entropy")
_PAPER_SKIP = 0.36  # of all layers, the paper's operating point


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """An agent as the command line names it: `kind` or `kind:value`."""

    kind: str
    value: str = ""

    @classmethod
    def parse(cls, word: str) -> AgentSpec:
        """Raises ValueError for a kind that there is not, or a value that does not fit it."""
        kind, _, value = word.strip().partition(":")
        spec = cls(kind, value)
        if kind not in KINDS or (kind == "never" and value):
            raise ValueError(
                f"--agents names {word!r}; there are never, random:RATIO, static:RATIO or static:3+5, "
                f"gate:TAU, sample:SEED and entropy:RATIO"
            )
        try:
            spec._number()
        except ValueError as error:
            raise ValueError(f"--agents names {word!r}, whose value is no number") from error
        return spec

    @property
    def names_layers(self) -> bool:
        return self.kind == "static" and bool(self.value) and "." not in self.value

    def _number(self) -> float | None:
        if self.names_layers:
            return float(len([int(layer) for layer in self.value.split("+")]))
        if self.kind == "sample":
            return float(int(self.value or 0))
        return float(self.value) if self.value else None

    def build(self, env: DecodeEnv, fit_questions: Sequence[int]) -> Agent:
        """The agent. fit_questions: indices that "entropy" is fitted on."""
        name, number = f"{self.kind}:{self.value}".removesuffix(":"), self._number()
        ratio = _PAPER_SKIP if number is None else number
        if self.kind == "never":
            return FixedAgent.never(env)
        if self.kind == "random":
            return RandomAgent.at_rate(env, ratio)
        if self.names_layers:
            return FixedAgent.skipping(env, map(int, self.value.split("+")), name)
        if self.kind == "static":
            return FixedAgent.skipping(env, spread_layers(env, ratio), name)
        if self.kind == "gate":
            return ModelGateAgent(name, env, GateMode.THRESHOLD, number)
        if self.kind == "sample":
            return ModelGateAgent(name, env, GateMode.SAMPLE, seed=int(number or 0))
        return EntropyAgent.fit(env, fit_questions, spread_layers(env, ratio), name=name)


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="python -m envs.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = "hub id, folder, .gguf file or smollm2-135m"
    parser.add_argument("--model", required=True, metavar="NAME", help=model)
    parser.add_argument("--gates-folder", metavar="DIR", help="trained gates, from save_gates")
    agents = "never,random:RATIO,static:RATIO,static:3+5,gate:TAU,sample:SEED,entropy:RATIO"
    parser.add_argument(
        "--agents", default="never,random:0.36,static:0.36,gate", metavar="LIST", help=agents
    )
    pool = "folder of a pool of questions (default: the sample of the package)"
    parser.add_argument("--pool", type=Path, metavar="DIR", help=pool)
    parser.add_argument("--questions", type=int, default=4, metavar="N", help="default 4")
    fitted = 'more questions, on which "entropy" is fitted; default 4'
    parser.add_argument("--fit-questions", type=int, default=4, metavar="N", help=fitted)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    longest = "leave out questions whose prompts are longer; default 512"
    parser.add_argument("--max-prompt-tokens", type=int, default=512, metavar="N", help=longest)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of drawn tokens; default 0")
    parser.add_argument("--beta", type=float, default=0.1, help="weight of saved compute")
    parser.add_argument("--lam", type=float, default=0.1, help="weight of the NLL increase")
    quality = "whose tokens the NLL is of"
    parser.add_argument(
        "--quality", choices=list(QualityTokens), default=QualityTokens.GOLD_AND_SELF, help=quality
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print one object instead of a table")
    return parser


def build_env(options: argparse.Namespace, spare_questions: int) -> tuple[DecodeEnv, bool]:
    """(environment with questions and then `spare_questions` more, whether the gates were trained)."""
    wanted = options.questions + spare_questions
    if options.questions < 1 or options.fit_questions < 1:
        raise ValueError("--questions and --fit-questions need at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; use --device cpu")
    settings = EnvSettings(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        reward=RewardSettings(beta=options.beta, lam=options.lam, quality=options.quality),
    )
    pool = default_pool() if options.pool is None else QuestionPool.read(options.pool)
    loaded = load_model(options.model, options.gates_folder, dtype=getattr(torch, options.dtype))
    pool, encoded = pool.encode(loaded.tokenizer, options.max_prompt_tokens)
    shuffled = pool.batch(0, len(pool.train))
    usable = [q for q in shuffled if len(encoded[q.id].answer_ids) >= MIN_ANSWER_TOKENS]
    if wanted > len(usable):
        raise ValueError(
            f"{wanted} questions are needed ({spare_questions} of them to fit on), but the pool has "
            f"{len(usable)}; ask for fewer or give a larger --pool"
        )
    model: Any = loaded.model
    model.to(options.device)
    questions = usable[:wanted]
    env = DecodeEnv(
        loaded.model, questions, loaded.tokenizer, settings, encode=lambda q, _: encoded[q.id]
    )
    return env, loaded.trained


def table(rows: Sequence[AgentRow]) -> Table:
    """One line an agent."""
    title = "Decoding, then the gold answer: means over episodes"
    made = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("agent", no_wrap=True)
    headings = ("columns", "skipped", "C/C_full", "ΔNLL", "β·saved", "−λ·ΔNLL", "R")
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = (row.nll_increase, row.compute_term, row.quality_term, row.reward)
        cells = [f"{number:+.4f}" for number in numbers]
        made.add_row(
            row.agent, str(row.columns), f"{row.skip_ratio:.1%}", f"{row.executed_frac:.4f}", *cells
        )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one sentence on standard error for what a user can put right."""
    console = Console(stderr=True)
    try:
        options = _parser().parse_args(argv)
        specs = [AgentSpec.parse(word) for word in options.agents.split(",")]
        fits = any(spec.kind == "entropy" for spec in specs)
        env, trained = build_env(options, options.fit_questions if fits else 0)
        spare = range(options.questions, len(env.questions))
        agents = [spec.build(env, spare) for spec in specs]
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    if not trained and any(spec.kind in ("gate", "sample") for spec in specs):
        print("The gates were never trained: what they skip is arbitrary.", file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("episodes", total=len(agents) * options.questions)

        def count(record: EpisodeRecord) -> None:
            progress.advance(task)

        rows = compare_agents(env, agents, range(options.questions), options.seed, count)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        Console().print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
