"""Programs of several calls, how calls are told what to do, and how products are cut."""

from __future__ import annotations

import math

import pytest
import torch

from fbs_rl.decode.gate_rows import PANEL
from fbs_rl.decode.kernel_arguments import Void, kinds, make_call
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.product_plan import ProductPlan
from fbs_rl.decode.program import MOST_SHARED_BYTES, WARPS, Program
from tests.decode_bench import ROWS, Bench, assert_close


@pytest.mark.parametrize("flags", [(0, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_calls_follow_each_other(bench: Bench, flags: tuple[int, ...]) -> None:
    """Three products in a row, the second void where all rows skip; again in a second launch of the same program."""
    first, second, third = bench.normal(40, 48), bench.normal(24, 40), bench.normal(97, 24)
    x, hidden, out = bench.normal(ROWS, 48), bench.blank(ROWS, 40), bench.blank(ROWS, 97)
    middle = bench.normal(ROWS, 24)
    kept, skip_B = middle.clone(), bench.integers(*flags)
    calls = (
        bench.product_call("product_plain", [first], input=x, out=hidden, out_stride=40),
        bench.product_call("product_plain", [second], skip_B, input=hidden, out=middle, out_stride=24),
        bench.product_call("product_plain", [third], input=middle, out=out, out_stride=97),
    )  # fmt: skip
    calls[1].void_flags = skip_B
    program = Program.of(calls, bench.shape, bench.launcher.multiprocessors, bench.device)
    for _ in range(2):
        out.fill_(math.nan)
        bench.launcher.run(program, 0, 3)
        wanted = hidden.double() @ second.double().T if not all(flags) else kept.double()
        assert_close(hidden, x.double() @ first.double().T, bench.dtype)
        assert_close(middle, wanted, bench.dtype)
        assert_close(out, middle.double() @ third.double().T, bench.dtype)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("kept_from", [-1, 400])
def test_weights_of_a_wrong_guess_are_not_used(bench: Bench, skips: bool, kept_from: int) -> None:
    """Flags that a call turns round while weights are asked for by them; more weights than a ring holds."""
    x, first, middle, last = (
        bench.normal(*s) for s in ((ROWS, 1040), (40, 1040), (600, 1040), (97, 1040))
    )
    outs = [bench.blank(ROWS, len(weight)) for weight in (first, middle, last)]
    skip_B, wanted = bench.integers(*[int(not skips)] * ROWS), x.double() @ middle.double().T
    zero = torch.zeros(3 * PANEL * PANEL, dtype=bench.dtype, device=bench.device)
    tau_B = torch.full(
        (ROWS,), 0.4 if skips else 0.6, device=bench.device
    )  # the gate says one half
    turns = make_call(
        "decide", 32 * 1024, front=zero, reduce_width=4, weights=zero, hidden_width=2, clip=6.0, eps=1e-6,
        motion_B2=torch.zeros(ROWS, 2, device=bench.device),
        tau_B=tau_B, seed_B2=bench.integers(*[0] * 2 * ROWS), position_B=bench.integers(*[0] * ROWS), members=1,
        free_mask=1, skip_LB=skip_B, layers=1, step=bench.integers(0), trace_steps=0,
    )  # fmt: skip
    flags = (None, skip_B, None)
    products = [
        bench.product_call(
            "product_plain", [weight], flag, kept_from if flag is not None else -1, input=x, out=out,
            out_stride=out.shape[1],
        )
        for weight, out, flag in zip((first, middle, last), outs, flags, strict=True)
    ]  # fmt: skip
    bench.run(products[0], turns, *products[1:])
    assert skip_B.tolist() == [int(skips)] * ROWS
    made = slice(600 if kept_from < 0 else kept_from, 600) if skips else slice(0, 600)
    kept = torch.zeros(600, dtype=torch.bool)
    kept[made] = True
    assert_close(outs[0], x.double() @ first.double().T, bench.dtype)
    if bool(kept.any()):
        assert_close(outs[1][:, made], wanted[:, made], bench.dtype)
    assert torch.equal(outs[1].isnan().any(0).cpu(), ~kept)
    assert_close(outs[2], x.double() @ last.double().T, bench.dtype)


@pytest.mark.parametrize("flags", [(0, 0, 0), (1, 0, 1), (1, 1, 1)])
def test_calls_that_are_void_for_the_same_reason_are_passed_over(
    bench: Bench, flags: tuple[int, ...]
) -> None:
    """Two where a row runs, then one where all skip; weights of what follows come in front of all three."""
    skip_B, runs = bench.integers(*flags), 0 in flags
    weights = [bench.normal(24, 24) for _ in range(6)]
    x, out = bench.normal(ROWS, 24), [bench.blank(ROWS, 24) for _ in range(6)]
    sources = [x, x, out[0], out[2], out[1], x]
    calls = [
        bench.product_call("product_plain", [weight], input=source, out=target, out_stride=24)
        for weight, source, target in zip(weights, sources, out, strict=True)
    ]
    calls[1].quiet_flags, calls[1].quiet_where = skip_B, Void.SOME_ROW_RUNS
    for call in calls[2:5]:
        call.void_flags = skip_B
    calls[4].void_where = Void.SOME_ROW_RUNS
    program = Program.of(calls, bench.shape, bench.launcher.multiprocessors, bench.device)
    for _ in range(2):
        for target in out:
            target.fill_(math.nan)
        bench.launcher.run(program, 0, 6)
        for place in [0, 1, 2, 3, 5] if runs else [0, 1, 4, 5]:
            wanted = sources[place].double() @ weights[place].double().T
            assert_close(out[place], wanted, bench.dtype)
        for place in [4] if runs else [2, 3]:
            assert bool(out[place].isnan().all())


def test_a_ring_of_one_piece_is_enough(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that is longer than the one in front and does not fit behind it: it must not wait for room for both."""
    short, long = bench.normal(96, 240), bench.normal(96, 328)
    x, out = bench.normal(ROWS, 328), [bench.blank(ROWS, 96) for _ in range(4)]
    calls = [
        bench.product_call("product_plain", [weight], input=x, input_stride=328, out=made, out_stride=96)
        for weight, made in zip((short, long, short, long), out, strict=True)
    ]  # fmt: skip
    pieces = {call.arguments.weights.chunk for call in calls}
    longest = -(-bench.shape.out_rows * bench.shape.row_bytes(max(pieces)) // 128) * 128
    assert len(pieces) == 2
    warps = WARPS if bench.shape.tensor_cores else 1  # that share a ring
    monkeypatch.setattr("fbs_rl.decode.program._MOST_RING_BYTES", longest // warps)
    program = Program.of(calls, bench.shape, bench.launcher.multiprocessors, bench.device)
    assert program.ring_bytes == longest
    bench.launcher.run(program, 0, len(calls))
    for made, weight in zip(out, (short, long, short, long), strict=True):
        assert_close(made, x[:, : weight.shape[1]].double() @ weight.double().T, bench.dtype)


def test_a_program_without_room_is_refused() -> None:
    weight, shape = torch.zeros(64, 9728), KernelShape(8, False, 128, 4)
    plan = ProductPlan.of(64, 9728, shape, 132, kinds()["product_plain"])
    cut = {"columns": 9728, "matrix": [weight], **plan.weights()}
    call = make_call("product_plain", plan.room_bytes, weights=cut)
    with pytest.raises(ValueError, match="decode fewer rows at once or in bfloat16"):
        Program.of([call], shape, 132, torch.device("cpu"))


def test_structures_are_read_from_the_source() -> None:
    assert {"attention", "decide", "look", "product_qkv", "advance"} <= kinds().keys()
    assert len({kind.number for kind in kinds().values()}) == len(kinds())
    assert kinds()["product_gate_up"].writes == "GATED" and not kinds()["look"].writes
    fields = [field[0] for field in kinds()["product_qkv"].arguments._fields_]
    assert fields[:3] == ["weights", "input", "input_stride"]
    with pytest.raises(KeyError, match="takes no colour"):
        make_call("embed", colour=1)


QWEN3_4B = [
    ("product_qkv", 6144, 2560),
    ("product_attention_out", 2560, 4096),
    ("product_gate_up", 19456, 2560),
    ("product_down", 2560, 9728),
    ("product_logits", 151936, 2560),
]


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("name", "outputs", "columns"), [*QWEN3_4B, ("product_plain", 8, 128)])
def test_plans_cover_every_column_and_balance_the_warps(
    rows: int, name: str, outputs: int, columns: int
) -> None:
    shape = KernelShape(rows, True, 128, 4)
    plan = ProductPlan.of(outputs, columns, shape, 132, kinds()[name])
    assert columns == plan.parts * plan.splits * plan.unit_chunks * plan.chunk
    assert plan.chunk % 8 == 0 and plan.room_bytes <= 120 * 1024
    assert plan.parts == 1 or kinds()[name].reads == "PLAIN"
    if rows > 1:  # all warps share every piece
        assert plan.splits == 1 and plan.chunk >= min(columns, 1216)
        return
    each = math.ceil(outputs / plan.blocks)
    busiest = math.ceil(each * plan.splits / WARPS) * columns / plan.splits
    if outputs > 1000:
        assert busiest <= 1.1 * each * columns / WARPS


@pytest.mark.parametrize(("rows", "pieces"), [(2, 4), (4, 4), (8, 3), (16, 2)])
def test_inputs_of_several_rows_leave_room_for_weights(rows: int, pieces: int) -> None:
    """So many pieces of Qwen3-4B's products."""
    shape, room, longest = KernelShape(rows, True, 128, 4), 0, 0
    for name, outputs, columns in QWEN3_4B:
        plan = ProductPlan.of(outputs, columns, shape, 132, kinds()[name])
        norm = 0 if kinds()[name].reads == "PLAIN" else 2 * columns
        room = max(room, plan.room_bytes + norm)
        longest = max(longest, shape.out_rows * shape.row_bytes(plan.chunk))
    assert (MOST_SHARED_BYTES - 4096 - room) // 128 * 128 >= pieces * longest


def test_plans_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        ProductPlan.of(64, 100, KernelShape(1, True, 128, 4), 132, kinds()["product_plain"])
    with pytest.raises(ValueError, match="takes 1 to 16"):
        KernelShape(17, True, 128, 4)
