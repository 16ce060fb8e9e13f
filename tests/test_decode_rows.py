"""Products of several bfloat16 rows, which tensor cores multiply, against a float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from tests.decode_bench import Bench, assert_close
from tests.decode_launchers import PLACES
from tests.test_decode_kernels import normed


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[2, 5, 8, 9, 16])
def crowd(request: pytest.FixtureRequest, place: str) -> Bench:
    """Fewer rows than a matrix of a tensor core has, as many, and more than its upper half takes."""
    return Bench(place, torch.bfloat16, request.param)


@pytest.mark.parametrize(
    ("outputs", "columns"), [(1, 8), (6, 40), (97, 48), (34, 1040), (25, 2624)]
)
def test_groups_that_are_not_full(crowd: Bench, outputs: int, columns: int) -> None:
    """A single output, columns that no matrix divides, blocks that end within a group, pieces of several chunks."""
    rows = crowd.shape.rows
    weight, x, bias = (
        crowd.normal(outputs, columns),
        crowd.normal(rows, columns),
        crowd.normal(outputs),
    )
    out = crowd.blank(rows, outputs)
    crowd.product("product_plain", [weight], input=x, out=out, out_stride=outputs, bias_N=bias)
    assert_close(out, x.double() @ weight.double().T + bias.double(), crowd.dtype)


@pytest.mark.parametrize("input_bytes", [4096, 9000])
def test_inputs_that_come_in_parts(
    crowd: Bench, input_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two products in a row, the second of what the first made; sums of all parts meet in one."""
    monkeypatch.setattr("fbs_rl.decode.product_plan._INPUT_BYTES", input_bytes)
    rows = crowd.shape.rows
    first, second = crowd.normal(720, 40), crowd.normal(30, 720)
    x, middle, out = crowd.normal(rows, 40), crowd.blank(rows, 720), crowd.blank(rows, 30)
    calls = (
        crowd.product_call("product_plain", [first], input=x, out=middle, out_stride=720),
        crowd.product_call("product_plain", [second], input=middle, out=out, out_stride=30),
    )
    assert calls[1].arguments.weights.parts > 1 or rows * 1472 <= input_bytes
    crowd.run(*calls)
    assert_close(middle, x.double() @ first.double().T, crowd.dtype)
    assert_close(out, middle.double() @ second.double().T, crowd.dtype)


def test_pairs_of_more_rows_than_a_block_keeps_sums_of(crowd: Bench) -> None:
    rows, pairs = crowd.shape.rows, 3 * 1024 // crowd.shape.rows // 2 + 35
    gate, up, norm = crowd.normal(pairs, 48), crowd.normal(pairs, 48), crowd.normal(48)
    x, out = crowd.normal(rows, 48), crowd.blank(rows, pairs)
    crowd.product("product_gate_up", [gate, up], input=x, norm=norm, out=out, out_stride=pairs)
    wide = normed(x) * norm.double()
    wanted = torch.nn.functional.silu(wide @ gate.double().T) * (wide @ up.double().T)
    assert_close(out, wanted, crowd.dtype)


def test_the_best_of_more_logits_than_a_block_keeps_sums_of(crowd: Bench) -> None:
    rows, outputs = crowd.shape.rows, 3 * 1024 // crowd.shape.rows + 101
    weight, x, norm = crowd.normal(outputs, 24), crowd.normal(rows, 24), crowd.normal(24)
    out, blocks = crowd.blank(rows, outputs), crowd.launcher.multiprocessors
    best = torch.full((blocks, rows), -math.inf, device=crowd.device)
    index = torch.zeros(blocks, rows, dtype=torch.int32, device=crowd.device)
    crowd.product(
        "product_logits", [weight], input=x, norm=norm, out=out, out_stride=outputs, best=best, best_index=index
    )  # fmt: skip
    assert_close(out, (normed(x) * norm.double()) @ weight.double().T, crowd.dtype)
    found = index[best.argmax(0), torch.arange(rows, device=crowd.device)].long()
    assert torch.equal(best.amax(0), out.float().amax(-1))
    assert torch.equal(out.float().gather(1, found.unsqueeze(1))[:, 0], out.float().amax(-1))


@pytest.mark.parametrize("queries", [[], [35]])
def test_a_group_that_reads_both_inputs(crowd: Bench, queries: list[int]) -> None:
    """Keys and values end, and the front begins, within a group of eight; a group of three matrices, too."""
    rows = crowd.shape.rows
    weights, front = [crowd.normal(count, 48) for count in [*queries, 30, 6]], crowd.normal(45, 48)
    weighted = sum(len(weight) for weight in weights)
    x, norm, out = crowd.normal(rows, 48), crowd.normal(48), crowd.blank(rows, weighted + 45)
    name = "product_qkv_front" if queries else "product_entry"
    crowd.product(name, [*weights, front], input=x, norm=norm, out=out, out_stride=weighted + 45)
    wide = normed(x) * norm.double()
    assert_close(out[:, :weighted], wide @ torch.cat(weights).double().T, crowd.dtype)
    assert_close(out[:, weighted:], normed(x) @ front.double().T, crowd.dtype)
