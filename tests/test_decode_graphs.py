"""Decode steps on memory of their own, as a CUDA graph reads them, with layers left out by a flag: on a CPU.

Work is run again where a GPU would replay it, and the host looks at the flag; what a capture forbids only a GPU shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fbs_rl.serving.serving_settings import ServingSettings
from tests.served_engine import (
    LENGTHS,
    MASKED,
    Again,
    differences,
    exchange_gates,
    generate,
    random_prompts,
    start,
)
from tests.served_tiny import make_folder
from tests.tiny import NOOP


class Looking:
    """Branches that the host takes."""

    def __init__(self) -> None:
        self.run, self.left_out = 0, 0

    def when(self, flag: Tensor, piece: Callable[[], None]) -> None:
        if bool(flag):
            self.run += 1
            piece()
        else:
            self.left_out += 1


def with_graphs(llm: Any) -> Any:
    """The engine's model, whose decode steps are run again and again from now on."""
    from fbs_rl.serving.decode_graphs import DecodeGraphs

    worker = llm.llm_engine.model_executor.driver_worker.worker
    model = worker.model_runner.get_model().model
    model.branches, model.rows_at_once = Looking(), 6
    model.graphs = DecodeGraphs(model, 256, Again(), model.branches)
    return model


def serve(folder: Path, family: str = "llama", sampled: bool = False, **options: Any) -> dict[str, Any]:  # fmt: skip
    model = make_folder(folder, family, **options)
    llm = start(folder, additional_config=MASKED)
    served = with_graphs(llm)
    prompts = random_prompts(1, LENGTHS)
    counts = [16 + 4 * i for i in range(len(prompts))]
    # The third and the last skip nothing: the last is alone at the end, in steps without gates.
    ours: list[dict[str, Any]] = [
        {"gate_seed": 7 + i} if sampled else {"tau": 0.5} for i in range(len(prompts))
    ]
    ours[2] = ours[-1] = {"gates": "dense"}
    mode = {"gates": "sample" if sampled else "threshold"}
    gates = [{**mode, **given} for given in ours]
    wrong = differences(model, prompts, *generate(llm, prompts, counts, ours), gates)
    alone = generate(llm, prompts[:1], [24], ours[:1])  # nobody else has its layers run
    return {
        "wrong": wrong + differences(model, prompts[:1], *alone, gates[:1]),
        "recorded": served.graphs.recorded,
        "names": {name[1] for name in served.graphs._graphs},
        "left out": served.branches.left_out,
        "run": served.branches.run,
    }


SCENARIOS: dict[str, dict[str, Any]] = {
    "project, adapter": {},
    "project, identity, qwen3, sampled": {
        "family": "qwen3",
        "skip_path": "identity",
        "sampled": True,
    },
    "noop, identity": {**NOOP},
    "noop, adapter, sampled": {"kv_on_skip": "noop", "sampled": True},
    "blocks of two": {"gate_block": 2, "never_skip": (-1,)},
    "no chunks": {"chunk": False},
    "no previews": {"paw": False, "gate_inputs": "residual"},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_replayed_steps_give_the_referees_tokens_and_actions(
    there: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    found = there(serve, tmp_path / "model", **SCENARIOS[name])
    assert found["wrong"] == []
    assert found["recorded"] > 3 and found["names"] == {True, False}
    assert found["left out"] > 40 < found["run"]


def serve_changed_gates(folder: Path, parts: str) -> dict[str, Any]:
    """Graphs of one version of the gates, asked after an update."""
    model = make_folder(folder)
    llm = start(folder, additional_config=MASKED)
    served = with_graphs(llm)
    prompts = random_prompts(2, LENGTHS[:2])
    generate(llm, prompts, [8, 8], [{"tau": 0.5}] * 2)
    kept = len(served.graphs._graphs)
    exchange_gates(llm, model, parts)
    left = len(served.graphs._graphs)
    outputs, traces = generate(llm, prompts, [20, 20], [{"tau": 0.5}] * 2)
    gates = [{"tau": 0.5, "gates": "threshold"}] * 2
    return {
        "wrong": differences(model, prompts, outputs, traces, gates),
        "graphs": (kept, left),
    }


@pytest.mark.parametrize("parts", ["gates", "gates+paw"])
def test_graphs_see_new_gates(there: Callable[..., Any], tmp_path: Path, parts: str) -> None:
    """New gates need no new graphs; new previews do, since what is derived from them lies elsewhere."""
    found = there(serve_changed_gates, tmp_path / "model", parts)
    assert found["wrong"] == []
    kept, left = found["graphs"]
    assert kept > 0 and left == (kept if parts == "gates" else 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"graphs": "full"}, "which needs fixed shapes; set fbs.decode_path to masked"),
        ({"graphs": "some", "decode_path": "masked"}, "must be one of none, full, branches"),
        ({"graph_rows": 0}, "fbs.graph_rows is 0; give more than 0"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServingSettings(**given)


def refused(folder: Path, graphs: str) -> str:
    """What an engine says that is asked for graphs where vLLM takes the machine for one without CUDA."""
    from vllm import LLM
    from vllm.platforms.cpu import CpuPlatform

    from fbs_rl.serving import engine_checks

    engine_checks.current_platform = CpuPlatform()
    make_folder(folder)
    settings = {"decode_path": "masked", "graphs": graphs}
    try:
        LLM(str(folder), skip_tokenizer_init=True, additional_config={"fbs": settings})
    except ValueError as error:
        return str(error)
    return ""


def test_graphs_need_cuda(there: Callable[..., Any], tmp_path: Path) -> None:
    said = there(refused, tmp_path / "model", "full")
    assert "fbs.graphs is 'full', but vLLM runs on cpu here; leave it out" in said
