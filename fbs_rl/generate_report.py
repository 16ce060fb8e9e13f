"""What a generation was and what it cost, as text for people; pure functions of the JSON result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.color import ColorSystem

from fbs_rl.decode.structure import Structure
from fbs_rl.shading import legend, strip, strip_key

if TYPE_CHECKING:
    from fbs_rl.generate import Job

TITLES = {
    "threshold": "gated by threshold",
    "sample": "gated by sampling",
    "dense": "dense",
}
UNTRAINED = "The gates of this model have never been trained: which layers they skip is arbitrary."
_NONE = "-"


def describe(job: Job) -> dict[str, Any]:
    """What is run, ready for JSON."""
    options, model = job.options, job.loaded.model
    gates: dict[str, Any] = {"mode": job.mode}
    if job.mode == "threshold":
        gates["tau"] = model.config.tau if options.tau is None else options.tau
    if job.mode == "sample":
        gates["gate_seed"] = options.gate_seed or 0
    if job.mode != "dense":
        gates |= {"never_skip": job.never_skip, "trained": job.loaded.trained}
    tokens = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    if options.temperature > 0:
        tokens |= {"top_p": options.top_p or 1.0, "seed": options.seed}
    return {
        "model": options.model,
        "layers": model.config.layer_count,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": options.device,
        "prompt": job.prompt,
        "prompt_tokens": len(job.prompt_ids),
        "gates": gates,
        "tokens": tokens,
    }


def heading(result: dict[str, Any]) -> str:
    """One line: the model and the settings."""
    tokens, gates = result["tokens"], result["gates"]
    drawn = "greedy"
    if tokens["temperature"] > 0:
        drawn = (
            f"temperature {tokens['temperature']}, top-p {tokens['top_p']}, seed {tokens['seed']}"
        )
    decided = {"threshold": "tau", "sample": "gate_seed"}.get(gates["mode"])
    return (
        f"{result['model']}: {result['layers']} layers, {result['dtype']} on {result['device']}, "
        f"{result['prompt_tokens']} prompt tokens, {drawn}"
        + (f", {decided.replace('_', ' ')} {gates[decided]}" if decided else "")
    )


def summary(result: dict[str, Any], system: ColorSystem | None) -> str:
    """Legend, strips, table and comparison."""
    run, dense = result["run"], result.get("dense")
    blocks = []
    if run["skip_ratio"] is not None and run["mode"] != "dense":
        if system:
            blocks.append(legend(result["layers"], system))
        else:
            shares = [s / result["layers"] for s in run["skipped_by_token"] if s is not None]
            blocks.append(f"share of layers skipped, by token\n{strip(shares)}")
        by_layer = strip(run["skip_share_by_layer"])
        blocks.append(f"share of tokens that skipped, by layer ({strip_key()})\n{by_layer}")
    columns = [run] if dense is None else [run, dense]
    blocks.append(_table([["", *(c["mode"] for c in columns)], *_rows(columns)]))
    notes = [*_skipping_note(run), *_safety_notes(result), *_comparison_notes(result)]
    return "\n\n".join([*blocks, *notes])


def _rows(columns: list[dict[str, Any]]) -> list[list[str]]:
    def row(name: str, cell: Any) -> list[str]:
        return [name, *(cell(c) for c in columns)]

    return [
        row("tokens made", lambda c: f"{len(c['token_ids'])} ({c['stop']})"),
        row("layers skipped", lambda c: _format(c["skip_ratio"], ".1%")),
        row("gate probabilities", lambda c: _span(c["gate_prob_range"])),
        row("executed / dense FLOPs", lambda c: _flops(c, "executed_frac")),
        row("  by eq (4): layers alone", lambda c: _flops(c, "eq4")),
        row("executed GFLOPs a token", lambda c: _flops(c, "executed", 1e9 * max(c["steps"], 1))),
        row("decoding, tokens/s", lambda c: _format(c["tokens_per_s"], ".2f")),
        row("prefill, s", lambda c: _format(c["prefill_s"], ".3f")),
        row("KV cache, MB", lambda c: _format(c["kv_cache_bytes"] / 1e6, ".3f")),
    ]


def _format(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _span(span: list[float] | None) -> str:
    return _NONE if span is None else f"{span[0]:.3f} to {span[1]:.3f}"


def _flops(run: dict[str, Any], name: str, unit: float = 1.0) -> str:
    return _NONE if run["flops"] is None else f"{run['flops'][name] / unit:.4f}"


def _skipping_note(run: dict[str, Any]) -> list[str]:
    span = run["gate_prob_range"]
    if run["mode"] != "threshold" or run["skip_ratio"] != 0 or span is None:
        return []
    if span[1] >= run["tau"]:
        return ["Nothing was skipped: every token that a gate would have let skip was protected."]
    return [
        f"Nothing was skipped: the highest gate probability was {span[1]:.3f}, below tau {run['tau']}; "
        f"a lower --tau skips more."
    ]


def setting(mode: str, tau: float | None) -> str:
    """What an attempt was made with."""
    return mode if tau is None else f"tau {tau:g}"


def _safety_notes(result: dict[str, Any]) -> list[str]:
    safety = result.get("safety")
    if safety is None:
        return []
    metrics, attempts, lines = safety["metrics"], safety["attempts"], []
    if safety["protect_structure"]:
        kinds = {k: metrics[f"safety/protected_{k}_tokens"] for k in Structure}
        named = ", ".join(f"{kind} {count}" for kind, count in kinds.items() if count)
        lines.append(
            f"Structure: {metrics['safety/protected_tokens']} of {metrics['safety/tokens']} fed tokens ran every "
            f"layer{f' ({named})' if named else ''}."
        )
    if safety["validator"] is not None:
        for number, attempt in enumerate(attempts, 1):
            verdict = f"failed, {attempt['error']}" if attempt["error"] else "passed"
            made_with = setting(attempt["mode"], attempt["tau"])
            lines.append(f"Check {safety['validator']}, attempt {number} ({made_with}): {verdict}.")
        lines.append(_kept(attempts))
    return ["\n".join(lines)]


def _kept(attempts: list[dict[str, Any]]) -> str:
    last, total = attempts[-1], sum(a["flops"] for a in attempts)
    cost = f"decoding executed {total / 1e9:.4f} GFLOPs in all attempts"
    if last["error"] is None:
        return f"Attempt {len(attempts)} was kept; {cost}, {last['flops'] / 1e9:.4f} in that one."
    if last["mode"] == "dense":
        return f"No attempt passed, not even the dense one; its text was kept; {cost}."
    return f"The text was kept though it failed, since --reruns is 0; {cost}."


def _comparison_notes(result: dict[str, Any]) -> list[str]:
    made = result.get("comparison")
    if made is None:
        return []
    first, count = made["first_difference"], len(result["run"]["token_ids"])
    text = (
        f"Both texts are the same, {count} tokens."
        if first is None
        else f"The texts differ from token {first + 1} on (the run without skipping is the reference)."
    )
    if made["speedup"] is None:
        return [text]
    return [
        f"{text}\nGated decoding ran at {made['speedup']:.2f} times the speed of dense (one run each)."
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
