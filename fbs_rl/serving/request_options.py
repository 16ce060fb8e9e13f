"""What one request asks of its gates: read from SamplingParams.extra_args, which HTTP clients send as `vllm_xargs`.

Over HTTP a value is a string, a number or a list of these, so flags are also read from 0, 1, "true", "false".
"""

from __future__ import annotations

import argparse
import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fbs_rl.decode.safety import VALIDATORS, critical_layers
from fbs_rl.generate_options import parse_layers
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.rl.gate_policy import GatePolicy, ProbabilityBound
from fbs_rl.types import GateMode

_MODES = (GateMode.THRESHOLD, GateMode.SAMPLE, GateMode.DENSE)
_KEY_CHARS = 256
_RERUNS = 2
_CLOSE = 0.81  # a key as near to one of ours as this is a slip, not another plugin's
_ALLOWED = {
    "gates": f"one of {', '.join(_MODES)}",
    "tau": "a number in [0, 1]",
    "gate_seed": "an integer from -2^63 to 2^63 - 1",
    "gate_policy": "a list of temperature, lowest and highest probability, such as [1.0, 0.02, 0.98]",
    "request_key": f"a string of 1 to {_KEY_CHARS} characters",
    "never_skip": 'a list of layers such as [0, 1, -1], or a string such as "first:2,last:6"',
    "protect_structure": "true or false",
    "decode_start": "a token index, 0 or more",
    "validate": f"one of {', '.join(VALIDATORS)}",
    "reruns": "an integer, 0 or more",
}
_MEANING = {
    "gates": "what decides whether a token skips a layer (default: threshold with tau, sample with gate_seed, "
    "else the model's)",
    "tau": "skip where a gate's probability is at least this (default: the model's)",
    "gate_seed": "noise of sampled gates; draws are a function of it",
    "gate_policy": "sampled gates draw with low + (high - low)·σ(logit(p) / temperature) instead of p",
    "request_key": "the caller's own name of the request's trace; without one no trace is kept",
    "never_skip": "layers that always run, besides the model's own",
    "protect_structure": "skip nothing inside brackets, quotations, JSON and code",
    "decode_start": "first token at which gates may act (default: the prompt's length)",
    "validate": "make the text again, skipping less, if it fails this check",
    "reruns": f"with validate, at most so often; the last time dense (default: {_RERUNS})",
}


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """One request's settings, checked.

    mode: THRESHOLD, SAMPLE or DENSE. tau: threshold on the probability of skipping, in [0, 1]. seed: int64
    noise seed, 0 where nothing is drawn. policy: what decisions are drawn with; None: p itself. key: the
    caller's own name of its trace; None: none is kept. never_skip: layers from 0, besides the model's own.
    decode_start: first token index at which gates may act; None: the prompt's length, and less scores given
    tokens. validate: a name in VALIDATORS. reruns: attempts after the first that a failed check may cost.
    """

    mode: GateMode
    tau: float
    seed: int
    key: str | None
    never_skip: frozenset[int]
    protect_structure: bool
    decode_start: int | None
    validate: str | None
    reruns: int
    policy: GatePolicy | None = None

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None, config: FBSConfig) -> RequestOptions:
        """The options among `extra_args`, the rest from `config`; keys of other plugins are left alone.

        gates="dense" silences the other options, so that one key makes any request dense.
        Raises ValueError, in one sentence, for a value of another type or range, a key that is nearly one
        of ours, and options that could change nothing.
        """
        extra_args = {} if extra_args is None else extra_args
        _refuse_slips(extra_args)
        given = {name: value for name in _ALLOWED if (value := extra_args.get(name)) is not None}
        read = {name: _READERS[name](value, config) for name, value in given.items()}
        mode: GateMode = read.get("gates", _implied_mode(read, config))
        _check_together(mode, read, config)
        tries = _RERUNS if "validate" in read else 0
        return cls(
            mode=mode,
            tau=read.get("tau", config.tau),
            seed=read.get("gate_seed", 0),
            key=read.get("request_key"),
            never_skip=read.get("never_skip", frozenset()),
            protect_structure=read.get("protect_structure", False),
            decode_start=read.get("decode_start"),
            validate=read.get("validate"),
            reruns=read.get("reruns", tries),
            policy=read.get("gate_policy"),
        )

    @staticmethod
    def names() -> dict[str, str]:
        """The keys of extra_args that are read, each with its meaning and what it may be."""
        return {name: f"{_MEANING[name]}; {_ALLOWED[name]}" for name in _ALLOWED}

    def check_prompt(self, prompt_tokens: int) -> int:
        """The first token index at which gates may act; ValueError if it lies behind the prompt's end."""
        if self.decode_start is None:
            return prompt_tokens
        if self.decode_start > prompt_tokens:
            raise ValueError(
                f"decode_start is {self.decode_start}, but the prompt has {prompt_tokens} tokens; "
                f"give at most {prompt_tokens}, or leave it out"
            )
        return self.decode_start


def _refuse_slips(extra_args: Mapping[str, Any]) -> None:
    for name in extra_args:
        if name in _ALLOWED or not isinstance(name, str):
            continue
        plain = name.lower().replace("-", "_")
        close = difflib.get_close_matches(plain, _ALLOWED, n=1, cutoff=_CLOSE)
        if close:
            raise ValueError(f"unknown option {name!r}; did you mean {close[0]!r}?")


def _implied_mode(read: Mapping[str, Any], config: FBSConfig) -> GateMode:
    """A seed asks for sampled gates and τ for threshold gates; else what the model is made for."""
    if "gate_seed" in read:
        return GateMode.SAMPLE
    return GateMode.THRESHOLD if "tau" in read else GateMode(config.gates)


def _check_together(mode: GateMode, read: Mapping[str, Any], config: FBSConfig) -> None:
    if mode is not GateMode.DENSE and not config.gate:
        raise ValueError(
            f'gates is "{mode}", but this model was made without gates; give "dense" or leave it out'
        )
    if "reruns" in read and "validate" not in read:
        raise ValueError("reruns is given without validate; name a check, or leave reruns out")
    if mode is GateMode.DENSE and "gates" in read:
        return
    needs = {
        "tau": GateMode.THRESHOLD,
        "gate_seed": GateMode.SAMPLE,
        "gate_policy": GateMode.SAMPLE,
    }
    for name, wanted in needs.items():
        if name in read and mode is not wanted:
            raise ValueError(
                f'{name} is given, but gates is "{mode}"; add gates="{wanted}" or leave {name} out'
            )
    if mode is GateMode.SAMPLE and "gate_seed" not in read:
        raise ValueError(
            'gates is "sample" without gate_seed; give an int64, since draws are a function of it'
        )


# --- one value ----------------------------------------------------------------------------------------


def _wrong(name: str, value: object) -> ValueError:
    return ValueError(f"{name} is {reprlib.repr(value)}; give {_ALLOWED[name]}")


def _whole(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(name, value)
    return value


def _mode(value: object, _: FBSConfig) -> GateMode:
    if not isinstance(value, str) or value not in _MODES:
        raise _wrong("gates", value)
    return GateMode(value)


def _tau(value: object, _: FBSConfig) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _wrong("tau", value)  # NaN lies nowhere
    return float(value)


def _seed(value: object, _: FBSConfig) -> int:
    return _whole("gate_seed", value, -(2**63), 2**63 - 1)


def _policy(value: object, _: FBSConfig) -> GatePolicy:
    numbers = list(value) if isinstance(value, list | tuple) else []
    if len(numbers) != 3 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):  # fmt: skip
        raise _wrong("gate_policy", value)
    temperature, low, high = map(float, numbers)
    try:
        return GatePolicy(temperature=temperature, low=low, high=high, bound=ProbabilityBound.MIX)
    except ValueError as error:
        raise ValueError(f"gate_policy: {error}") from error


def _key(value: object, _: FBSConfig) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _KEY_CHARS:
        raise _wrong("request_key", value)
    return value


def _never_skip(value: object, config: FBSConfig) -> frozenset[int]:
    count = config.layer_count
    spans: tuple[int, ...] = ()
    if isinstance(value, str):
        try:
            named = parse_layers(value)
        except argparse.ArgumentTypeError:
            raise _wrong("never_skip", value) from None
        value, (first, last) = list(named.layers), (named.first, named.last)
        try:
            spans = critical_layers(count, first, last)
        except ValueError as error:
            raise ValueError(f"never_skip: {error}") from error
    if not isinstance(value, list | tuple):
        raise _wrong("never_skip", value)
    for layer in value:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise _wrong("never_skip", value)
        if not -count <= layer < count:
            raise ValueError(
                f"never_skip names layer {layer}, but the model has layers 0 to {count - 1}"
            )
    return frozenset(layer % count for layer in value) | frozenset(spans)


def _flag(value: object, _: FBSConfig) -> bool:
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    if isinstance(value, int) and value in (0, 1):  # a bool is one of these
        return bool(value)
    raise _wrong("protect_structure", value)


def _start(value: object, _: FBSConfig) -> int:
    return _whole("decode_start", value, 0, 2**31 - 1)


def _check_name(value: object, _: FBSConfig) -> str:
    if not isinstance(value, str) or value not in VALIDATORS:
        raise _wrong("validate", value)
    return value


def _reruns(value: object, _: FBSConfig) -> int:
    return _whole("reruns", value, 0, 2**31 - 1)


_READERS = {
    "gates": _mode,
    "tau": _tau,
    "gate_seed": _seed,
    "gate_policy": _policy,
    "request_key": _key,
    "never_skip": _never_skip,
    "protect_structure": _flag,
    "decode_start": _start,
    "validate": _check_name,
    "reruns": _reruns,
}
