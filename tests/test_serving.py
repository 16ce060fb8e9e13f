"""The vLLM plugin against the referee: every token and every action of real engines, in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.served_engine import (
    COMPACT,
    LENGTHS,
    MASKED,
    differences,
    generate,
    padded,
    random_prompts,
    serve_and_compare,
    served_model,
    start,
)
from tests.served_tiny import make_folder, referee
from tests.tiny import NOOP

CONSENSUS = {"fbs": {"batch": "consensus"}}


# --- equality -----------------------------------------------------------------------------------------

PATHS: dict[str, dict[str, Any]] = {
    "native": {},
    "compact": {"additional_config": COMPACT},
    "masked": {"additional_config": MASKED},
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "project, adapter": {},
    "project, sampled": {"sampled": True},
    "noop, identity": {**NOOP},
    "noop, sampled, qwen3": {"family": "qwen3", "sampled": True, **NOOP},
    "noop, adapter": {"kv_on_skip": "noop"},
    "project, identity, qwen3": {"family": "qwen3", "skip_path": "identity"},
    "blocks of two": {"gate_block": 2, "never_skip": (-1,)},
    "ahead": {"gate_ahead": 1},
    "blocks of two, ahead, no entries": {"gate_block": 2, "gate_ahead": 1, **NOOP},
    "every layer looks ahead, hard window": {"paw_layers": "all", "paw_inclusion": "hard"},
    "no chunks": {"chunk": False},
    "no previews": {"paw": False, "gate_inputs": "residual"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_token_and_action_is_the_referees(
    there: Callable[..., Any], tmp_path: Path, name: str, path: str
) -> None:
    found = there(serve_and_compare, tmp_path / "model", engine=PATHS[path], **SCENARIOS[name])
    assert found["wrong"] == [] and found["native"] == (path == "native")
    assert 0.1 < found["skip"] < 0.8


def pages_known(folder: Path) -> dict[str, bool]:
    """For which kernels of vLLM the compiled step takes their pages to be in the order that it knows."""
    from fbs_rl.serving.paged_attention import keeps_columns

    make_folder(folder)
    llm = start(folder)
    attention = served_model(llm).layers[0].self_attn.attn
    found = {"as started": keeps_columns(attention)}
    for kernels in ("vec", "amx", "neon"):
        attention.isa = kernels
        found[kernels] = keeps_columns(attention)
    return found


def test_pages_of_another_order_are_left_to_vllm(there: Callable[..., Any], tmp_path: Path) -> None:
    known = there(pages_known, tmp_path / "model")
    assert known == {"as started": True, "vec": True, "amx": False, "neon": False}


@pytest.mark.parametrize("kv", ["project", "noop"])
def test_prompts_in_pieces_change_nothing(
    there: Callable[..., Any], tmp_path: Path, kv: str
) -> None:
    engine = {"max_num_batched_tokens": 32}
    found = there(serve_and_compare, tmp_path / "model", engine=engine, kv_on_skip=kv)
    assert found["wrong"] == [] and found["closes"] > 50


@pytest.mark.parametrize("kv", ["project", "noop"])
@pytest.mark.parametrize("path", PATHS)
def test_preempted_requests_are_replayed(
    there: Callable[..., Any], tmp_path: Path, kv: str, path: str
) -> None:
    engine = {"num_gpu_blocks_override": 10, **PATHS[path]}
    asked = {"sampled": True, "tokens": 80, "kv_on_skip": kv}
    found = there(serve_and_compare, tmp_path / "model", engine=engine, **asked)
    assert found["wrong"] == []
    assert found["replayed"] > 20


def _mode(given: dict[str, Any]) -> str:
    return given.get("gates", "sample" if "gate_seed" in given else "threshold")


def serve_under_stress(folder: Path, **model_options: Any) -> dict[str, Any]:
    """36 requests on 6 slots, pieces of 48, few blocks, shared prefixes, a mode of its own for each."""
    model = make_folder(folder, **model_options)
    llm = start(
        folder, max_num_batched_tokens=48, num_gpu_blocks_override=14,
        enable_prefix_caching=not model_options.get("chunk", True),
    )  # fmt: skip
    draw = random.Random(5)
    base = random_prompts(3, [96])[0]
    prompts = [
        base[: draw.choice([0, 32, 64, 96])] + random_prompts(100 + i, [draw.choice([1, 2, 17, 48, 49])])[0]
        for i in range(36)
    ]  # fmt: skip
    kinds: list[dict[str, Any]] = [
        {"tau": 0.5},
        {"tau": 0.62},
        {"gate_seed": 3},
        {"gates": "dense"},
        {"tau": 0.5, "never_skip": [0, 3]},
    ]
    ours = [kinds[i % len(kinds)] for i in range(36)]
    gates = [{**given, "gates": _mode(given)} for given in ours]
    counts = [draw.randrange(30, 90) for _ in prompts]
    outputs, traces = generate(llm, prompts, counts, ours)
    hits = [m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits"]
    return {
        "wrong": differences(model, prompts, outputs, traces, gates),
        "replayed": sum(t.replayed_tokens for t in traces),
        "hits": sum(hits),
    }


@pytest.mark.parametrize("options", [{}, NOOP, {"chunk": False}, {"chunk": False, **NOOP}])
def test_many_requests_with_modes_of_their_own(
    there: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    found = there(serve_under_stress, tmp_path / "model", **options)
    assert found["wrong"] == []
    assert found["replayed"] > 20
    assert (found["hits"] > 100) == ("chunk" in options)  # the controls of prefix caching


# --- controls: what must differ, differs --------------------------------------------------------------


def serve_and_mislead(folder: Path) -> dict[str, bool]:
    """Whether wrong referees are caught: another τ, a dense pass, the other policy for keys and values."""
    model = make_folder(folder, **NOOP)
    llm = start(folder)
    prompts = random_prompts(1, LENGTHS[2:5])
    outputs, traces = generate(llm, prompts, [40] * 3, [{"tau": 0.5}] * 3)

    def caught(**gates: Any) -> bool:
        return bool(differences(model, prompts, outputs, traces, [gates] * 3))

    found = {
        "right": caught(gates="threshold", tau=0.5),
        "other tau": caught(gates="threshold", tau=0.6),
        "dense": caught(gates="dense"),
    }
    model.config.kv_on_skip = "project"
    found["keys of skipped tokens"] = caught(gates="threshold", tau=0.5)
    return found


def test_wrong_referees_are_caught(there: Callable[..., Any], tmp_path: Path) -> None:
    found = there(serve_and_mislead, tmp_path / "model")
    assert found.pop("right") is False
    assert all(found.values()), found


def recompute_without_replay(folder: Path) -> tuple[int, list[str]]:
    """Preempted requests whose history is forgotten: what they recompute must not be what they did."""
    from fbs_rl.serving.session import Session

    model = make_folder(folder, **NOOP)
    llm = start(folder, num_gpu_blocks_override=10)
    plain = Session.columns
    Session.columns = lambda self, first, count: (0, plain(self, first, count)[1])  # type: ignore
    prompts = random_prompts(1, LENGTHS)
    outputs, traces = generate(llm, prompts, [100] * 8, [{"tau": 0.5}] * 8)
    wrong = differences(model, prompts, outputs, traces, [{"gates": "threshold", "tau": 0.5}] * 8)
    Session.columns = plain
    return len(wrong), wrong


def test_recomputing_densely_would_show(there: Callable[..., Any], tmp_path: Path) -> None:
    assert there(recompute_without_replay, tmp_path / "model")[0] > 0


# --- sampled tokens, one decision for all -------------------------------------------------------------


def serve_sampled_tokens(folder: Path) -> list[str]:
    model = make_folder(folder)
    llm = start(folder)
    prompts = random_prompts(1, LENGTHS)
    outputs, traces = generate(llm, prompts, [30] * 8, [{"tau": 0.5}] * 8, temperature=1.0, seed=3)
    gates = [{"gates": "threshold", "tau": 0.5}] * 8
    assert len({tuple(o) for o in outputs}) > 1
    return differences(model, prompts, outputs, traces, gates, greedy=False)


def test_sampled_tokens_have_the_referees_actions(there: Callable[..., Any], tmp_path: Path) -> None:  # fmt: skip
    assert there(serve_sampled_tokens, tmp_path / "model") == []


def serve_consensus(folder: Path, masked: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Equal prompts' length and start, so that all rows decode together from the first token on."""
    model = make_folder(folder, **options)
    settings = {"batch": "consensus", "decode_path": "masked" if masked else "compact"}
    llm = start(folder, additional_config={"fbs": settings})
    prompts = random_prompts(4, [20] * 6)
    given = [{"tau": tau} for tau in (0.4, 0.45, 0.5, 0.5, 0.5, 0.55)]
    outputs, traces = generate(llm, prompts, [40] * 6, given)
    skip_BTL = torch.stack([torch.from_numpy(t.skip_TL) for t in traces])
    prob_BTL = torch.stack([torch.from_numpy(t.prob_TL) for t in traces])
    free_L = [i for i in range(skip_BTL.shape[2]) if i not in model.config.protected_layers]
    mean_TL = prob_BTL.mean(0)[:, free_L]
    decided_TL = mean_TL >= torch.tensor([g["tau"] for g in given]).mean()
    clear_TL = (mean_TL - 0.4833).abs() > 1e-5
    replayed = [
        referee(model, p, o, gates="replay", skip=padded(skip_BTL[i], len(p)))
        for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))
    ]
    return {
        "agree": bool((skip_BTL == skip_BTL[:1]).all()),
        "rule": bool((skip_BTL[0][:, free_L] == decided_TL)[clear_TL].all()),
        "tokens": all(r.chosen == o for r, o in zip(replayed, outputs, strict=True)),
        "skip": float(skip_BTL.float().mean()),
    }


@pytest.mark.parametrize("options", [{}, NOOP])
@pytest.mark.parametrize("masked", [False, True])
def test_consensus_decides_for_all_rows_by_the_mean(
    there: Callable[..., Any], tmp_path: Path, masked: bool, options: dict[str, Any]
) -> None:
    found = there(serve_consensus, tmp_path / "model", masked, options)
    assert found["agree"] and found["rule"] and found["tokens"], found
    assert 0.1 < found["skip"] < 0.9


# --- scoring, structure, memory -----------------------------------------------------------------------


def score_answers(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from fbs_rl.serving.client import score

    model = make_folder(folder, **options)
    llm = start(
        folder, max_num_batched_tokens=48, enable_prefix_caching=not options.get("chunk", True)
    )
    prompts = random_prompts(1, LENGTHS)
    answers = random_prompts(2, [1, 2, 5, 30, 33, 64, 7, 3])
    asked = [{"tau": 0.5}, {"gate_seed": 5}] * 4
    pairs = list(zip(prompts, answers, strict=True))
    found = []
    for turn in range(2):  # the second finds prompts in the prefix cache where there is one
        keyed = [{**a, "request_key": f"{turn} {i}"} for i, a in enumerate(asked)]
        scores = score(llm, pairs, keyed)
        for (prompt, answer), given, got in zip(pairs, asked, scores, strict=True):
            mode = "sample" if "gate_seed" in given else "threshold"
            wanted = referee(model, prompt, answer, gates=mode, **given)
            same = torch.equal(torch.from_numpy(got.trace.skip_TL), wanted.skip_TL)
            nll = float((torch.from_numpy(got.nll_N) - wanted.nll_N).abs().max())
            found.append((same, nll < 1e-4, len(got.nll_N) == len(answer)))
    dense = [referee(model, p, a, gates="dense").nll_N.sum() for p, a in pairs]
    gated = [s.nll_N.sum() for s in scores]
    return {"same": found, "moved": max(abs(a - b) for a, b in zip(dense, gated, strict=True))}


@pytest.mark.parametrize("options", [{}, NOOP, {"chunk": False}, {"chunk": False, **NOOP}])
def test_given_answers_are_scored_with_gates_acting(
    there: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    found = there(score_answers, tmp_path / "model", options)
    assert all(all(row) for row in found["same"]), found["same"]
    assert found["moved"] > 0.05


def bound_memory(folder: Path) -> dict[str, Any]:
    """Traces that nobody fetches stay within their limit."""
    from vllm import SamplingParams

    make_folder(folder)
    llm = start(folder, additional_config={"fbs": {"trace_bytes": 4000}})
    prompts = [{"prompt_token_ids": p} for p in random_prompts(1, [5] * 12)]
    for turn in range(3):
        params = [
            SamplingParams(
                max_tokens=20, ignore_eos=True, detokenize=False,
                extra_args={"tau": 0.5, "request_key": f"{turn} {i}"},
            )
            for i in range(12)
        ]  # fmt: skip
        llm.generate(prompts, params, use_tqdm=False)
    return llm.collective_rpc("fbs_memory")[0]


def test_traces_nobody_fetches_are_dropped(there: Callable[..., Any], tmp_path: Path) -> None:
    found = there(bound_memory, tmp_path / "model")
    assert found["trace_bytes"] <= 4000 + 20 * 60 * 6 and found["traces_dropped"] > 20
