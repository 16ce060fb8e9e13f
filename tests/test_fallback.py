"""Texts made again until they pass a check, in Python; tests/test_serving_http.py has the same over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fbs_rl.model import FBSConfig
from fbs_rl.types import GateMode
from tests.served_text import make_text_folder
from tests.served_tiny import referee

DENSE = {"gates": GateMode.DENSE}


def tau(value: float) -> dict[str, Any]:
    return {"gates": GateMode.THRESHOLD, "tau": value}


# --- over there ---------------------------------------------------------------------------------------


def ladder_of(options: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    from fbs_rl.serving.fallback import gate_ladder
    from fbs_rl.serving.request_options import RequestOptions

    return gate_ladder(RequestOptions.parse(options, FBSConfig(gates="threshold")))


def refusal(options: dict[str, Any], has_text: bool = True, **sampling: Any) -> str | None:
    from vllm import SamplingParams

    from fbs_rl.serving.admission import Admission
    from fbs_rl.serving.serving_settings import ServingSettings

    settings = ServingSettings(batch="consensus")
    admission = Admission(FBSConfig(gates="threshold"), settings, has_text)
    try:
        admission.admit(SamplingParams(extra_args=options, **sampling))
    except ValueError as error:
        return str(error)
    return None


ASKED: list[dict[str, Any]] = [
    {"tau": 0.5, "validate": "json", "request_key": "fails"},
    {"tau": 0.5},
    {"gates": "sample", "gate_seed": 3, "validate": "json"},
    {"gates": "dense", "validate": "json"},
    {"tau": 0.5, "validate": "json", "reruns": 0},
    {"tau": 0.5, "validate": "brackets"},
]
PROMPTS = ["{", "The fox", "Readers", "Readers", "{", "Readers"]
TOKENS = [12, 12, 12, 12, 12, 1]


def serve(folder: Path) -> dict[str, Any]:
    """One batch of requests with and without checks, and what plain generate says."""
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from fbs_rl.serving.client import take_traces
    from fbs_rl.serving.fallback import generate

    model, _ = make_text_folder(folder)
    llm = LLM(str(folder), dtype="float32", max_model_len=256)
    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, extra_args=options)
        for options, count in zip(ASKED, TOKENS, strict=True)
    ]
    names = [f"fbs:{n}_total" for n in ("validator_failures", "reruns", "fallbacks", "unresolved")]
    answers = generate(llm, PROMPTS, params)
    counts = [REGISTRY.get_sample_value(name) for name in names]
    gates = [DENSE, tau(0.5), DENSE, DENSE, tau(0.5), tau(0.5)]
    tokens = [list(answer.output.outputs[0].token_ids) for answer in answers]
    said: list[str] = []
    try:
        llm.generate(PROMPTS[:1], params[0])
    except VLLMValidationError as error:
        said.append(str(error))
    try:
        generate(llm, PROMPTS, params[:2])
    except ValueError as error:
        said.append(str(error))
    return {
        "wrong": [
            i
            for i, (answer, told) in enumerate(zip(answers, gates, strict=True))
            if referee(model, answer.output.prompt_token_ids or [], tokens[i], **told).chosen != tokens[i]
        ],
        "tokens": tokens,
        "failed": [[error is not None for error in answer.errors] for answer in answers],
        "skips": [float(t.skip_TL.mean()) for t in take_traces(llm, ["fails"])],
        "counts": counts,
        "said": said,
        "kept": params[0].extra_args,
    }  # fmt: skip


# --- here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ladder"),
    [
        ({"tau": 0.5, "validate": "json"}, (tau(0.5), tau(0.75), DENSE)),
        ({"tau": 0.5, "validate": "json", "reruns": 3}, (tau(0.5), tau(0.75), tau(0.875), DENSE)),
        ({"tau": 0.5, "validate": "json", "reruns": 0}, (tau(0.5),)),
        ({"validate": "json", "reruns": 1}, (tau(0.8), DENSE)),  # the model's own tau
        ({"gates": "sample", "gate_seed": 3, "validate": "json", "reruns": 5}, ({}, DENSE)),
        ({"gates": "sample", "gate_seed": 3, "validate": "json", "reruns": 0}, ({},)),
        ({"gates": "dense", "validate": "json"}, ({},)),
    ],
)
def test_each_attempt_skips_less(
    there: Callable[..., Any], options: dict[str, Any], ladder: tuple[dict[str, Any], ...]
) -> None:
    assert there(ladder_of, options) == ladder


@pytest.mark.parametrize(
    ("options", "how", "sentence"),
    [
        ({"validate": "json"}, {"n": 2}, "validate checks the one text of a request, but n is 2"),
        ({"validate": "json"}, {"detokenize": False}, "but detokenize is off"),
        ({"validate": "json"}, {"has_text": False}, "validate reads the text, but this engine"),
        ({"protect_structure": True}, {"has_text": False}, "protect_structure reads the text"),
        ({"gates": "sample", "gate_seed": 1}, {}, "this engine decides for all rows at once"),
        ({"tau": 2}, {}, "tau is 2; give a number in [0, 1]"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    there: Callable[..., Any], options: dict[str, Any], how: dict[str, Any], sentence: str
) -> None:
    said = there(refusal, options, **how)
    assert said is not None and sentence in said


def test_what_it_can_do_is_not(there: Callable[..., Any]) -> None:
    assert there(refusal, {"validate": "json", "protect_structure": True}) is None
    assert there(refusal, {"tau": 0.5}, has_text=False, n=2, detokenize=False) is None


def test_a_batch_is_made_again_where_it_failed(there: Callable[..., Any], tmp_path: Path) -> None:
    found = there(serve, tmp_path / "model")
    assert found["wrong"] == []
    assert [len(tokens) for tokens in found["tokens"]] == TOKENS
    assert found["failed"] == [[True] * 3, [], [True] * 2, [True], [True], [False]]
    first, second, last = found["skips"]
    assert first > second > last == 0
    # 3 + 2 + 1 + 1 failures; 2 + 1 attempts more, for two requests; four kept a failed text.
    assert found["counts"] == [7, 3, 2, 4]
    plain, uneven = found["said"]
    assert "call fbs_rl.serving.fallback.generate" in plain
    assert uneven == "6 prompts have 2 params; give one, or one each"
    assert found["kept"] == ASKED[0]  # the caller's parameters are as they were
