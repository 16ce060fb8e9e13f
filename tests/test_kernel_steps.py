"""Decode steps of an engine by the graph decoder's kernels on its pages: here by the CPU's emulation of them.

vLLM's pages on a CPU hold keys column by column, so each step works on a copy in the order of a GPU's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fbs_rl.serving.serving_settings import ServingSettings
from tests.cuda_emulator import COMPILER, EmulatedLauncher
from tests.served_engine import (
    Again,
    differences,
    exchange_gates,
    generate,
    random_prompts,
    served_model,
    start,
)
from tests.served_tiny import make_folder
from tests.tiny import NOOP

ROWS = (1, 3)
_LENGTHS = (1, 40, 33, 90, 17)  # of prompts, three of which run at a time
_PAGES = 64  # more than they fill
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Mirror:
    """The engine's pages, once more in the order that the kernels know."""

    def __init__(self, served: Any) -> None:
        from fbs_rl.serving.kernel_steps import pages_of

        self.pages = [pages[:_PAGES] for pages in pages_of(served)]
        self.copies = [torch.full_like(pages, 1e4) for pages in self.pages]

    def columns(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [pages, G, D, entries] and values [pages, G, entries, D] of a layer, where they lie."""
        blocks, groups, entries, width = pages.shape
        flat, half = pages.view(blocks, groups, -1), entries * width // 2
        return (
            flat[..., :half].view(blocks, groups, width // 2, entries),
            flat[..., half:].view(blocks, groups, entries, width // 2),
        )

    def bring(self) -> None:
        for pages, copy in zip(self.pages, self.copies, strict=True):
            keys, values = self.columns(pages)
            copy.copy_(torch.cat((keys.transpose(2, 3), values), -1))

    def take_back(self) -> None:
        for pages, copy in zip(self.pages, self.copies, strict=True):
            keys, values = self.columns(pages)
            new_keys, new_values = copy.chunk(2, dim=-1)
            keys.copy_(new_keys.transpose(2, 3))
            values.copy_(new_values)


def with_kernels(llm: Any, **settings: Any) -> Any:
    """The engine's model, whose decode steps are the kernels' from now on."""
    from fbs_rl.serving import kernel_steps
    from fbs_rl.serving.kernel_steps import KernelSteps
    from fbs_rl.serving.served_view import view_of

    kernel_steps._TRACED = 7  # so that traces fill up

    outer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    served = outer.model
    served.settings = dataclasses.replace(served.settings, kernel_rows=ROWS, **settings)
    view = view_of(served, outer.lm_head.weight, served.native.held)
    mirror = Mirror(served)

    class Mirrored(KernelSteps):
        def run(self, id_R: Tensor, position_R: Tensor, plan: Any, batch: Any) -> Any:
            assert int(batch.block_RP.max()) < _PAGES
            mirror.bring()
            found = super().run(id_R, position_R, plan, batch)
            mirror.take_back()
            return found

    served.kernels = Mirrored(served, view, served.longest, Again(), EmulatedLauncher)
    served.kernels.prepare(mirror.copies)
    return served


def serve(
    folder: Path, family: str = "llama", sampled: bool = False, blocks: int | None = None, **options: Any
) -> dict[str, Any]:  # fmt: skip
    """blocks: pages of the cache; few of them make vLLM drop requests and begin them anew."""
    model = make_folder(folder, family, **options)
    llm = start(folder, max_num_seqs=3, num_gpu_blocks_override=blocks, max_model_len=160)
    served = with_kernels(llm)
    prompts = random_prompts(1, _LENGTHS)
    counts = [8, 12, 16, 20, 24] if blocks is None else [28, 28, 28, 4, 4]
    # The third and the last skip nothing: the last is alone at the end, in steps without gates.
    ours: list[dict[str, Any]] = [
        {"gate_seed": 7 + i} if sampled else {"tau": 0.5} for i in range(len(prompts))
    ]
    ours[2] = ours[-1] = {"gates": "dense"}
    ours[3]["never_skip"] = [2]
    mode = {"gates": "sample" if sampled else "threshold"}
    gates = [{**mode, **given} for given in ours]
    outputs, traces = generate(llm, prompts, counts, ours)
    wrong = differences(model, prompts, outputs, traces, gates)
    many = served.kernels.steps
    alone = generate(llm, prompts[:1], [12], ours[:1])
    return {
        "wrong": wrong + differences(model, prompts[:1], *alone, gates[:1]),
        "steps": (many, served.kernels.steps - many),
        "replayed": sum(trace.replayed_tokens for trace in traces),
        "skip": alone[1][0].skip_TL.mean(),
    }


SCENARIOS: dict[str, dict[str, Any]] = {
    "project, adapter": {},
    "project, identity, qwen3, sampled": {
        "family": "qwen3",
        "skip_path": "identity",
        "sampled": True,
    },
    "a layer ahead": {"gate_ahead": 1},
    "noop, identity": {**NOOP},
    "noop, adapter, sampled": {"kv_on_skip": "noop", "sampled": True},
    "no chunks": {"chunk": False},
    "blocks of two": {"gate_block": 2, "never_skip": (-1,)},
    "few pages": {"blocks": 6},
    "few pages, noop": {**NOOP, "blocks": 6},
}


@needs_compiler
@pytest.mark.parametrize("name", SCENARIOS)
def test_kernels_on_pages_give_the_referees_tokens_and_actions(
    there: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Rows come and go, prompts come between, and some rows are idle in a kernel for more of them."""
    found = there(serve, tmp_path / "model", **SCENARIOS[name])
    assert found["wrong"] == []
    assert (found["replayed"] > 0) == ("blocks" in SCENARIOS[name])
    many, alone = found["steps"]
    assert many > 20 and alone == 12  # its prompt is a single token, too
    assert 0.1 < found["skip"] < 0.9


def serve_consensus(folder: Path) -> dict[str, Any]:
    """The same requests before there are kernels and with them, all rows of a step deciding together."""
    make_folder(folder, gate_ahead=1)
    llm = start(folder, max_num_seqs=3, additional_config={"fbs": {"batch": "consensus"}})
    prompts, ours = random_prompts(4, [20] * 3), [{"tau": tau} for tau in (0.4, 0.5, 0.55)]
    wanted = generate(llm, prompts, [20, 20, 15], ours)
    served = with_kernels(llm)
    found = generate(llm, prompts, [20, 20, 15], ours)
    pairs = list(zip(wanted[1], found[1], strict=True))
    return {
        "tokens": wanted[0] == found[0],
        "actions": all(np.array_equal(one.skip_TL, other.skip_TL) for one, other in pairs),
        "skip": float(found[1][0].skip_TL.mean()),
        "steps": served.kernels.steps,
    }


@needs_compiler
def test_kernels_decide_for_all_rows_by_the_mean(there: Callable[..., Any], tmp_path: Path) -> None:
    """Two rows are no kernel's (idle ones would have a part in the mean): the last steps go the other way."""
    found = there(serve_consensus, tmp_path / "model")
    assert found["tokens"] and found["actions"] and 0.1 < found["skip"] < 0.9
    assert found["steps"] == 14


def complaint_of_backend(folder: Path) -> str:
    make_folder(folder)
    served = served_model(start(folder))
    served.settings = dataclasses.replace(served.settings, decode_path="kernel")
    try:
        served._check_backend()
    except ValueError as error:
        return str(error)
    return ""


def test_pages_of_another_order_are_refused(there: Callable[..., Any], tmp_path: Path) -> None:
    said = there(complaint_of_backend, tmp_path / "model")
    assert (
        "fbs.decode_path is 'kernel', which the attention backend CPU_ATTN cannot be used" in said
    )


def serve_changed_gates(folder: Path, parts: str) -> list[str]:
    """One version of the gates and then another, in kernels that keep copies of them."""
    model = make_folder(folder)
    llm = start(folder, max_num_seqs=1)
    with_kernels(llm)
    prompts = random_prompts(2, (40,))
    generate(llm, prompts, [3], [{"tau": 0.5}])
    exchange_gates(llm, model, parts)
    outputs, traces = generate(llm, prompts, [12], [{"tau": 0.5}])
    return differences(model, prompts, outputs, traces, [{"tau": 0.5, "gates": "threshold"}])


def fed_tokens(guarded: bool) -> list[int]:
    """What a session is told of a step whose token the host has not seen yet."""
    from fbs_rl.serving.runner import _scheduled

    batch = SimpleNamespace(
        req_ids=["one"], num_computed_tokens_cpu=np.array([3]), num_prompt_tokens=np.array([3]),
        token_ids_cpu=np.array([[5, 6, 7, -1, 0]]), prev_sampled_token_ids=torch.tensor([[41], [42]]),
        prev_req_id_to_index={"other": 0, "one": 1},
    )  # fmt: skip
    params = SimpleNamespace(extra_args=None)
    runner = SimpleNamespace(
        input_batch=batch,
        query_start_loc=SimpleNamespace(np=np.array([0, 1])),
        requests={"one": SimpleNamespace(sampling_params=params)},
        fbs=SimpleNamespace(reads_tokens=lambda name: guarded),
    )
    return list(_scheduled(runner)[0].tokens)


def test_a_token_on_its_way_is_asked_for_only_where_it_matters(there: Callable[..., Any]) -> None:
    assert there(fed_tokens, True) == [42] and there(fed_tokens, False) == [-1]


@needs_compiler
@pytest.mark.parametrize("parts", ["gates", "gates+paw"])
def test_kernels_follow_new_gates(there: Callable[..., Any], tmp_path: Path, parts: str) -> None:
    assert there(serve_changed_gates, tmp_path / "model", parts) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"decode_path": "kernels"}, "must be one of compact, masked, kernel"),
        (
            {"kernel_rows": (1, 32)},
            r"fbs.kernel_rows is \[1, 32\]; give numbers of rows from 1 to 16",
        ),
        ({"decode_path": "kernel", "graphs": "full"}, "which needs fixed shapes"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServingSettings(**given)
