"""The compiled step against torch's operations: the same decisions, the same numbers but for rounding."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fbs_rl.model import FBSCache
from fbs_rl.model.native import library
from fbs_rl.model.native_step import few_rows, native_step, product_of_few_rows
from fbs_rl.model.sequence_pass import Tokens
from fbs_rl.types import FBSOutput
from tests.tiny import NOOP, VOCAB, fresh, left_padded, lively

START, LENGTH = 9, 26
OPTIONS: list[dict[str, Any]] = [
    {},
    NOOP,
    {"gate_block": 2},
    {"gate_ahead": 1},
    {"gate_block": 3, "gate_ahead": 1, "kv_on_skip": "noop"},
    {"chunk": False},
    {"paw": False, "gate_inputs": "residual"},
    {"gate_inputs": "preview", "paw_layers": "all"},
    {"paw_window": "fixed", "kv_on_skip": "noop"},
    {"paw_inclusion": "hard", "paw_compression": "mean", "chunk_cache": 2},
]
GATES: dict[str, dict[str, Any]] = {
    "dense": {"gates": "dense"},
    "threshold": {"gates": "threshold", "tau": 0.5},
    "sample": {"gates": "sample"},
}


@contextmanager
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv(library.SWITCH, "0")
        library.native_library.cache_clear()
        yield
    library.native_library.cache_clear()


@torch.inference_mode()
def decoded(
    model: Any, ids: Tensor, mask: Tensor | None = None, threads: int = 1, **gates: Any
) -> list[FBSOutput]:
    """A prompt at once, then a token at a time; memory that was never written is NaN."""
    if gates.get("gates") == "sample":
        gates["gate_seed"] = torch.arange(len(ids)) * 0x1_2345_6789 - 1  # of all 64 bits
    cache, given = FBSCache(model.config.layer_count, poison=True), mask
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's prompt pass depends on it
    prompt = None if given is None else given[:, :START]
    found = [model(ids[:, :START], prompt, past_key_values=cache, **gates)]
    torch.set_num_threads(threads)
    for t in range(START, LENGTH):
        seen = None if given is None else given[:, : t + 1]
        found.append(model(ids[:, t : t + 1], seen, past_key_values=cache, **gates))
    torch.set_num_threads(before)
    return found[1:]


def drawn(rows: int, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def assert_equal(ours: list[FBSOutput], theirs: list[FBSOutput]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.skip, other.skip)
        for name in ("logits", "gate_prob", "lookahead", "boundary_logits"):
            if getattr(other, name) is not None:
                torch.testing.assert_close(
                    getattr(mine, name), getattr(other, name), rtol=1e-4, atol=1e-5
                )


def is_native(model: Any, rows: int = 1) -> bool:
    state = torch.zeros(rows, 1, model.config.hidden_size, dtype=model.dtype)
    with torch.inference_mode():
        tokens = Tokens(state, torch.zeros(rows, 1, dtype=torch.long), (state, state))
        return native_step(model.model, tokens) is not None


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_gives_what_torch_gives(
    family: str, options: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(family, **options)
    assert is_native(model)
    for rows in (1, 5, 13):
        ours = decoded(model, drawn(rows), **GATES[mode])
        with torch_alone(monkeypatch):
            assert not is_native(model)
            theirs = decoded(model, drawn(rows), **GATES[mode])
        assert_equal(ours, theirs)
        if mode != "dense":
            assert 0.05 < torch.stack([out.skip for out in theirs]).float().mean() < 0.95


@pytest.mark.parametrize("options", [{}, NOOP], ids=str)
def test_prompts_of_unequal_length(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = left_padded(5, [9, 4, 7])
    tail = drawn(3)[:, : LENGTH - START]
    ids, mask = torch.cat((ids, tail), 1), torch.cat((mask, torch.ones_like(tail)), 1)
    model = lively(**options)
    ours = decoded(model, ids, mask, **GATES["threshold"])
    with torch_alone(monkeypatch):
        assert_equal(ours, decoded(model, ids, mask, **GATES["threshold"]))


@pytest.mark.parametrize("bias", [False, True])
def test_threads_change_no_bit_of_a_row(bias: bool) -> None:
    """Each output is one thread's sum, so how many share them out does not show."""
    model = lively("qwen3", bias=bias)
    one, two = (decoded(model, drawn(1), threads=n, **GATES["sample"]) for n in (1, 2))
    monkey = pytest.MonkeyPatch()
    monkey.setattr("fbs_rl.model.native_step._SHARED_BYTES", 0)
    shared = decoded(model, drawn(1), threads=2, **GATES["sample"])
    monkey.undo()
    for a, b, c in zip(one, two, shared, strict=True):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.logits, c.logits)
        assert torch.equal(a.skip, c.skip)


# --- keys and values that are owed ---------------------------------------------------------------------------


def long_skips(model: Any, rows: int, tokens: int) -> Tensor:
    """Actions [L, rows, tokens]: layers that may skip do so for 5 to 40 tokens on end, all rows alike."""
    skip = torch.zeros(model.config.layer_count, rows, tokens, dtype=torch.bool)
    for layer in set(range(model.config.layer_count)) - set(model.config.protected_layers):
        on_end = (5, 17, 40)[layer % 3]
        skip[layer] = torch.arange(tokens) % (on_end + 3) < on_end
    return skip


@torch.inference_mode()
def replayed(
    model: Any, ids: Tensor, skip: Tensor, between: Callable[[FBSCache, int], FBSCache] = lambda c, t: c
) -> list[FBSOutput]:  # fmt: skip
    """A prompt, then a token at a time with these actions; between(cache, t) may do something with the cache."""
    cache = FBSCache(model.config.layer_count, poison=True)
    model(ids[:, :START], past_key_values=cache)
    found = []
    for t in range(START, ids.shape[1]):
        cache = between(cache, t)
        step: Any = {"gates": "replay", "skip": skip[:, :, t - START, None]}
        found.append(model(ids[:, t : t + 1], past_key_values=cache, **step))
    return found


def owed(cache: FBSCache) -> int:
    return max(kv.owed.count if kv.owed else 0 for kv in cache.layers)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_skipped_layers_owe_is_paid(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of skips longer and shorter than what may be owed, with every layer's memory filled with NaN at first."""
    model = lively(family)
    ids = torch.randint(0, VOCAB, (rows, START + 60), generator=torch.Generator().manual_seed(1))
    skip = long_skips(model, rows, 60)
    most = []

    def look(cache: FBSCache, t: int) -> FBSCache:
        most.append(owed(cache))
        return cache

    ours = replayed(model, ids, skip, look)
    assert max(most) == 16 // rows
    with torch_alone(monkeypatch):
        assert_equal(ours, replayed(model, ids, skip))
    monkeypatch.setattr("fbs_rl.model.native_step._MOST_OWED", 1)
    monkeypatch.setattr("fbs_rl.model.native_step._SHARED_BYTES", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    shared = replayed(model, ids, skip)
    torch.set_num_threads(threads)
    assert_equal(ours, shared)


@pytest.mark.parametrize(
    "what", ["torch reads on", "a copy goes on", "rows trade places", "dense for a step"]
)
def test_whoever_reads_the_cache_finds_what_was_owed(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively("qwen3", bias=True)
    ids = torch.randint(0, VOCAB, (2, START + 30), generator=torch.Generator().manual_seed(2))
    skip = long_skips(model, 2, 30)
    if what == "dense for a step":
        skip[:, :, 4] = False
    seen = []

    def meddle(cache: FBSCache, t: int) -> FBSCache:
        if t != START + 4:
            return cache
        seen.append(owed(cache))
        if what == "torch reads on":
            monkeypatch.setenv(library.SWITCH, "0")
            library.native_library.cache_clear()
        elif what == "a copy goes on":
            return copy.deepcopy(cache)
        elif what == "rows trade places":
            cache.reorder_cache(torch.tensor([1, 0]))
        else:
            for kv in copy.deepcopy(cache).layers:
                assert not kv.view()[0].isnan().any()
            assert owed(cache) > 0
        return cache

    def trade(cache: FBSCache, t: int) -> FBSCache:
        if t == START + 4 and what == "rows trade places":
            cache.reorder_cache(torch.tensor([1, 0]))
        return cache

    ours = replayed(model, ids, skip, meddle)
    assert seen == [4]
    with torch_alone(monkeypatch):
        assert_equal(ours, replayed(model, ids, skip, trade))


def test_bfloat16_rounds_where_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are taken in another order, so numbers differ by the last bits, and few decisions with them."""
    model = fresh("qwen3").to(torch.bfloat16)
    angles: Any = model.model.rotary_emb
    model.model.rotary_emb = type(angles)(angles.config)  # float32, as in a model that was loaded
    assert is_native(model)
    ours = decoded(model, drawn(4), **GATES["dense"])
    with torch_alone(monkeypatch):
        theirs = decoded(model, drawn(4), **GATES["dense"])
    mine, other = (torch.cat([out.logits for out in found], 1).float() for found in (ours, theirs))
    assert (mine - other).norm() / other.norm() < 0.02


def test_weights_that_move_or_change_are_seen() -> None:
    model = fresh()
    ids = drawn(1)
    before = decoded(model, ids, **GATES["dense"])[0].logits
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    changed = decoded(model, ids, **GATES["dense"])[0].logits
    assert not torch.equal(before, changed)
    weight = model.model.layers[3].mlp.down_proj.weight
    weight.data = weight.data.clone() / 1.5
    torch.testing.assert_close(decoded(model, ids, **GATES["dense"])[0].logits, before)


def test_who_listens_to_modules_gets_torchs_operations() -> None:
    model = fresh()
    assert is_native(model)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not is_native(model)
    handle.remove()
    with FlopCounterMode(display=False):
        assert not is_native(model)
    assert not is_native(fresh(segment_position=True))
    assert not is_native(model, rows=33)
    half = fresh()
    half.model.layers[0].skip_gate.to(torch.bfloat16)
    assert not is_native(half)


@pytest.mark.parametrize("inputs", [5, 64, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_few_rows(dtype: torch.dtype, inputs: int) -> None:
    """Blocks of rows of every width, whole and not, and numbers that do not fill a vector."""
    layer = torch.nn.Linear(inputs, 51).to(dtype)
    for rows in range(1, 33):
        given = torch.randn(rows, 1, inputs).to(dtype)
        exact = F.linear(given.double(), layer.weight.double(), layer.bias.double())
        with torch.inference_mode():
            made = product_of_few_rows(layer.weight, layer.bias, given)
            assert made is not None and torch.equal(few_rows(layer, given), made)
        near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}  # fmt: skip
        torch.testing.assert_close(made.double(), exact, **near)


def test_rows_of_a_product_do_not_touch_each_other() -> None:
    layer = torch.nn.Linear(64, 51)
    for rows in (3, 8, 13, 27):
        given = torch.randn(rows, 1, 64)
        with torch.inference_mode():
            clean = product_of_few_rows(layer.weight, layer.bias, given)
            given[1] = torch.nan
            spoilt = product_of_few_rows(layer.weight, layer.bias, given)
        assert clean is not None and spoilt is not None
        assert spoilt[1].isnan().all()
        others = [r for r in range(rows) if r != 1]
        assert torch.equal(spoilt[others], clean[others])


def test_without_a_compiler_it_says_so_and_decodes(tmp_path: Any) -> None:
    code = (
        "import warnings; from fbs_rl.model.native.library import native_library\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always'); assert native_library() is None\n"
        "print(said[0].message)"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CXX": ""}
    made = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "no C++ compiler was found" in made.stdout


def test_nobody_is_warned_of_what_he_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_alone(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.native_library() is None
