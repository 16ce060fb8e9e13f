"""Per-request options of the serving plugin: what extra_args may say, and what each mistake is told."""

from __future__ import annotations

from typing import Any

import pytest

from fbs_rl.model import FBSConfig
from fbs_rl.serving.request_options import RequestOptions
from fbs_rl.types import GateMode

LAYERS = 12


def config(**options: Any) -> FBSConfig:
    return FBSConfig(num_hidden_layers=LAYERS, **options)


def parse(extra_args: Any, **options: Any) -> RequestOptions:
    return RequestOptions.parse(extra_args, config(**{"gates": "threshold", **options}))


def refusal(extra_args: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        parse(extra_args, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 200
    return text


# --- read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra_args", [None, {}, {"tau": None}, {"kv_transfer_params": {"a": 1}}])
def test_what_is_not_given_comes_from_the_model(extra_args: Any) -> None:
    assert parse(extra_args, tau=0.65) == RequestOptions(
        mode=GateMode.THRESHOLD,
        tau=0.65,
        seed=0,
        key=None,
        never_skip=frozenset(),
        protect_structure=False,
        decode_start=None,
        validate=None,
        reruns=0,
    )
    assert RequestOptions.parse(extra_args, config(gates="dense")).mode is (GateMode.DENSE)


def test_every_option_is_read() -> None:
    given = {
        "gates": "sample",
        "gate_seed": -(2**63),
        "request_key": "episode 7/3",
        "never_skip": [0, -1, 11],
        "protect_structure": "true",
        "decode_start": 0,
        "validate": "json",
        "reruns": 0,
        "session_id": "somebody else's",
    }
    assert parse(given) == RequestOptions(
        mode=GateMode.SAMPLE,
        tau=0.8,
        seed=-(2**63),
        key="episode 7/3",
        never_skip=frozenset({0, 11}),
        protect_structure=True,
        decode_start=0,
        validate="json",
        reruns=0,
    )


def test_values_arrive_as_http_sends_them() -> None:
    assert parse({"tau": 1}).tau == 1.0 and parse({"tau": 0}).tau == 0.0
    flags = [(True, True), (False, False), (1, True), (0, False), ("true", True), ("false", False)]
    for sent, meant in flags:
        assert parse({"protect_structure": sent}).protect_structure is meant
    assert parse({"never_skip": "first:2,last:3,5"}).never_skip == {0, 1, 5, 9, 10, 11}
    assert parse({"never_skip": "-1,0"}).never_skip == {11, 0}
    assert parse({"never_skip": []}).never_skip == frozenset()


def test_checks_bring_reruns() -> None:
    assert parse({"validate": "brackets"}).reruns == 2
    assert parse({"validate": "brackets", "reruns": 5}).reruns == 5


def test_dense_silences_what_the_rest_asks() -> None:
    rest = {"tau": 0.3, "gate_seed": 4, "protect_structure": 1, "validate": "json"}
    assert parse({**rest, "gates": "dense"}).mode is GateMode.DENSE
    assert parse({"gates": "dense"}, gate=False, gates="dense").mode is GateMode.DENSE


def test_names_list_what_is_read() -> None:
    read = {
        "gates": "sample",
        "gate_seed": 1,
        "gate_policy": [1.0, 0.02, 0.98],
        "request_key": "k",
        "never_skip": "0",
        "decode_start": 1,
    }
    read |= {"protect_structure": 1, "validate": "json", "reruns": 1}
    assert set(RequestOptions.names()) == {*read, "tau"}
    assert "[0, 1]" in RequestOptions.names()["tau"]


def test_a_policy_is_three_numbers_and_for_sampled_gates() -> None:
    policy = parse({"gate_seed": 1, "gate_policy": [0.5, 0.1, 0.9]}).policy
    assert policy is not None and (policy.temperature, policy.low, policy.high) == (0.5, 0.1, 0.9)
    assert "give a list of temperature" in refusal({"gate_seed": 1, "gate_policy": [1, 0.1]})
    assert "strictly between 0 and 1" in refusal({"gate_seed": 1, "gate_policy": [1, 0.9, 0.1]})
    assert 'add gates="sample"' in refusal({"tau": 0.5, "gate_policy": [1, 0.1, 0.9]})


# --- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("gates", "replay", "threshold, sample, dense"),
        ("gates", "Dense", "threshold, sample, dense"),
        ("gates", ["dense"], "threshold, sample, dense"),
        ("gates", 1, "threshold, sample, dense"),
        ("tau", float("nan"), "[0, 1]"),
        ("tau", float("inf"), "[0, 1]"),
        ("tau", -0.01, "[0, 1]"),
        ("tau", 1.01, "[0, 1]"),
        ("tau", True, "[0, 1]"),
        ("tau", "0.5", "[0, 1]"),
        ("tau", [0.5], "[0, 1]"),
        ("gate_seed", 2**63, "2^63 - 1"),
        ("gate_seed", -(2**63) - 1, "-2^63"),
        ("gate_seed", 1.0, "an integer"),
        ("gate_seed", False, "an integer"),
        ("gate_seed", "7", "an integer"),
        ("request_key", "", "1 to 256 characters"),
        ("request_key", "k" * 257, "1 to 256 characters"),
        ("request_key", 7, "a string"),
        ("never_skip", 3, "a list of layers"),
        ("never_skip", [True], "a list of layers"),
        ("never_skip", ["first:2"], "a list of layers"),
        ("never_skip", [1.0], "a list of layers"),
        ("never_skip", "two", "first:2,last:6"),
        ("never_skip", "first:2,first:3", "first:2,last:6"),
        ("never_skip", "", "first:2,last:6"),
        ("protect_structure", "yes", "true or false"),
        ("protect_structure", 2, "true or false"),
        ("protect_structure", 1.0, "true or false"),
        ("decode_start", -1, "0 or more"),
        ("decode_start", 3.0, "0 or more"),
        ("decode_start", True, "0 or more"),
        ("validate", "xml", "brackets, json, python"),
        ("validate", True, "brackets, json, python"),
        ("reruns", -1, "0 or more"),
        ("reruns", "2", "0 or more"),
    ],
)
def test_a_bad_value_names_key_value_and_what_would_work(
    name: str, value: Any, allowed: str
) -> None:
    text = refusal({"validate": "json", name: value})
    assert text.startswith(f"{name} is ") and allowed in text
    assert repr(value)[:8] in text


def test_layers_that_the_model_lacks_are_refused() -> None:
    assert refusal({"never_skip": [3, 12]}) == (
        "never_skip names layer 12, but the model has layers 0 to 11"
    )
    assert "layer -13," in refusal({"never_skip": "-13"})
    assert "never_skip: protecting the first 6 and the last 6 of 12 layers leaves none" in refusal(
        {"never_skip": "first:6,last:6"}
    )


@pytest.mark.parametrize(
    "slip, meant",
    [
        ("gate", "gates"),
        ("TAU", "tau"),
        ("gate-seed", "gate_seed"),
        ("requestkey", "request_key"),
        ("neverskip", "never_skip"),
        ("protect_structures", "protect_structure"),
        ("decode_starts", "decode_start"),
        ("validator", "validate"),
        ("rerun", "reruns"),
    ],
)
def test_a_slip_is_told_the_right_key(slip: str, meant: str) -> None:
    assert refusal({slip: 1}) == f"unknown option {slip!r}; did you mean {meant!r}?"


@pytest.mark.parametrize(
    "name", ["seed", "request_id", "session_id", "kv_transfer_params", "max_tokens", "key", ""]
)
def test_keys_of_others_are_left_alone(name: str) -> None:
    assert parse({name: object()}) == parse(None)


def test_options_that_could_change_nothing_are_refused() -> None:
    assert 'gates is "sample"; add gates="threshold"' in refusal(
        {"gates": "sample", "gate_seed": 1, "tau": 0.5}
    )
    assert 'add gates="sample"' in refusal({"gate_seed": 1, "gates": "threshold"})
    assert 'gates is "sample"; add gates="threshold"' in refusal({"gate_seed": 1, "tau": 0.5})
    assert "without validate" in refusal({"reruns": 1})


def test_a_threshold_or_a_seed_says_what_decides() -> None:
    assert parse({"tau": 0.5}, gates="dense").mode is GateMode.THRESHOLD
    assert parse({"gate_seed": 3}, gates="dense").mode is GateMode.SAMPLE
    assert parse({}, gates="dense").mode is GateMode.DENSE


def test_sampling_needs_a_seed_and_gates_need_a_model_with_gates() -> None:
    assert "without gate_seed; give an int64" in refusal({"gates": "sample"})
    assert "without gate_seed" in refusal({}, gates="sample")
    assert "made without gates" in refusal({"gates": "threshold"}, gate=False, gates="dense")


def test_gates_cannot_begin_behind_the_prompt() -> None:
    assert parse({}).check_prompt(7) == 7
    assert [parse({"decode_start": n}).check_prompt(7) for n in (0, 3, 7)] == [0, 3, 7]
    with pytest.raises(
        ValueError, match="decode_start is 8, but the prompt has 7 tokens; give at most 7"
    ):
        parse({"decode_start": 8}).check_prompt(7)
