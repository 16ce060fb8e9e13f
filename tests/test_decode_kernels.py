"""The decoder's calls, each alone in a program, against a float64 reference, in both number formats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fbs_rl.decode.gate_rows import PANEL
from fbs_rl.decode.kernel_arguments import make_call
from fbs_rl.decode.step_buffers import MOST_FOUND
from fbs_rl.model.skip_gate import gate_uniform
from tests.decode_bench import GROUP, HEAD_DIM, ROWS, Bench, assert_close


def normed(x: Tensor) -> Tensor:
    return x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (97, 48), (34, 1040), (120, 608)])
def test_plain_product(bench: Bench, rows: int, columns: int) -> None:
    """Shapes with one warp's work, an odd number of rows, several chunks, and more rows than warps."""
    weight, x, bias, out = (
        bench.normal(rows, columns),
        bench.normal(ROWS, columns),
        bench.normal(rows),
        bench.blank(ROWS, rows),
    )
    bench.product("product_plain", [weight], input=x, out=out, out_stride=rows, bias_N=bias)
    assert_close(out, x.double() @ weight.double().T + bias.double(), bench.dtype)


def test_three_matrices_with_a_norm(bench: Bench) -> None:
    weights = [bench.normal(n, 48) for n in (32, 16, 16)]
    x, norm, out = bench.normal(ROWS, 48), bench.normal(48), bench.blank(ROWS, 64)
    bench.product("product_qkv", weights, input=x, norm=norm, out=out, out_stride=64)
    assert_close(out, (normed(x) * norm.double()) @ torch.cat(weights).double().T, bench.dtype)


def test_gated_product(bench: Bench) -> None:
    gate, up = bench.normal(40, 48), bench.normal(40, 48)
    x, norm, out = bench.normal(ROWS, 48), bench.normal(48), bench.blank(ROWS, 40)
    bench.product("product_gate_up", [gate, up], input=x, norm=norm, out=out, out_stride=40)
    wide = normed(x) * norm.double()
    wanted = torch.nn.functional.silu(wide @ gate.double().T) * (wide @ up.double().T)
    assert_close(out, wanted, bench.dtype)


def skipping(bench: Bench, *flags: int, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(what the layer's end writes, what it would if all ran, the states) with the flags of who skips."""
    weight, x = bench.normal(24, 32), bench.normal(ROWS, 32)
    residual, state, out = bench.normal(ROWS, 24), bench.normal(ROWS, 24), bench.blank(ROWS, 24)
    bench.product(
        "product_down",
        [weight],
        input=x,
        residual_Bd=residual,
        path={"state_Bd": state, "width": 24, **more},
        out=out,
        out_stride=24,
        skip_B=bench.integers(*flags),
    )
    return out, residual.double() + x.double() @ weight.double().T, state.double()


@pytest.mark.parametrize("flags", [(0, 0, 0), (0, 1, 0), (1, 1, 0)])
def test_rows_that_skip_keep_their_state(bench: Bench, flags: tuple[int, ...]) -> None:
    out, ran, state = skipping(bench, *flags)
    skip_B1 = torch.tensor(flags, device=bench.device).bool().unsqueeze(1)
    assert_close(out, torch.where(skip_B1, state, ran), bench.dtype)


@pytest.mark.parametrize("flags", [(0, 1, 0), (1, 0, 1)])
def test_rows_that_skip_take_the_adapter(bench: Bench, flags: tuple[int, ...]) -> None:
    up, down = bench.normal(24, 8), bench.normal(ROWS, 16)
    out, ran, state = skipping(bench, *flags, up=up, down=down[:, 8:], down_stride=16, rank=8)
    adapted = state + torch.nn.functional.silu(down[:, 8:].double()) @ up.double().T
    skip_B1 = torch.tensor(flags, device=bench.device).bool().unsqueeze(1)
    assert_close(out, torch.where(skip_B1, adapted, ran), bench.dtype)


@pytest.mark.parametrize("adapts", ["adapter", "identity"])
def test_the_end_of_a_layer_that_all_skip(bench: Bench, adapts: str) -> None:
    up, down, state = bench.normal(24, 8), bench.normal(ROWS, 16), bench.normal(ROWS, 24)
    out, wanted = bench.blank(ROWS, 24), state.double()
    path: dict[str, Any] = {"state_Bd": state, "width": 24}
    if adapts == "adapter":
        path |= {"up": up, "down": down[:, 8:], "down_stride": 16, "rank": 8}
        wanted = wanted + torch.nn.functional.silu(down[:, 8:].double()) @ up.double().T
    bench.run(make_call("skip_end", 4 * ROWS * 8 + 4 * 24 * 8, path=path, out_Bd=out))
    assert_close(out, wanted, bench.dtype)


def test_nobody_runs_but_some_outputs_are_kept(bench: Bench) -> None:
    """Keys and values of a layer that all rows skip; its queries stay unwritten."""
    weights = [bench.normal(n, 48) for n in (32, 16, 16)]
    x, norm, out = bench.normal(ROWS, 48), bench.normal(48), bench.blank(ROWS, 64)
    bench.product(
        "product_qkv",
        weights,
        input=x,
        norm=norm,
        out=out,
        out_stride=64,
        kept_from=32,
        skip_B=bench.integers(1, 1, 1),
    )
    wide = normed(x) * norm.double()
    assert_close(out[:, 32:], wide @ torch.cat(weights[1:]).double().T, bench.dtype)
    assert bool(out[:, :32].isnan().all())


@pytest.mark.parametrize("flags", [(0, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_queries_of_the_input_that_keys_values_and_front_left(
    bench: Bench, flags: tuple[int, ...]
) -> None:
    """The front reads the input without its weight; queries come whether they were looked for or not."""
    query, key, value, front = (bench.normal(n, 48) for n in (32, 16, 16, 24))
    x, norm, out = bench.normal(ROWS, 48), bench.normal(48), bench.blank(ROWS, 88)
    asked = bench.product_call(
        "product_entry", [key, value, front], input=x, norm=norm, out=out[:, 32:], out_stride=88
    )
    rest = bench.product_call("product_held", [query], bench.integers(*flags), out=out, out_stride=88)  # fmt: skip
    bench.run(asked, rest)
    wide = normed(x) * norm.double()
    assert_close(out[:, 32:64], wide @ torch.cat((key, value)).double().T, bench.dtype)
    assert_close(out[:, 64:], normed(x) @ front.double().T, bench.dtype)
    assert_close(out[:, :32], wide @ query.double().T, bench.dtype)


def test_the_best_logit_of_each_block(bench: Bench) -> None:
    weight, x, norm = bench.normal(97, 48), bench.normal(ROWS, 48), bench.normal(48)
    blocks = bench.launcher.multiprocessors
    out, best = bench.blank(ROWS, 97), torch.full((blocks, ROWS), -math.inf, device=bench.device)
    index = torch.zeros(blocks, ROWS, dtype=torch.int32, device=bench.device)
    bench.product(
        "product_logits",
        [weight],
        input=x,
        norm=norm,
        out=out,
        out_stride=97,
        best=best,
        best_index=index,
    )
    assert_close(out, (normed(x) * norm.double()) @ weight.double().T, bench.dtype)
    row_B = torch.arange(ROWS, device=bench.device)
    winner_B = best.argmax(0)
    assert torch.equal(index[winner_B, row_B].long(), out.float().argmax(-1))


def attention_case(
    bench: Bench, position: int, splits: int, noop: bool, flags: list[int], name: str = "attention"
) -> tuple[Tensor, Tensor, Any]:
    """(found, wanted, the buffers) of three rows that attend to `position` entries and their own."""
    heads, capacity = 2, 200
    qkv = bench.normal(ROWS, (GROUP + 2) * heads * HEAD_DIM)
    keys, values = (
        bench.normal(ROWS, heads, capacity, HEAD_DIM),
        bench.normal(ROWS, heads, capacity, HEAD_DIM),
    )
    angle = torch.rand(capacity, HEAD_DIM // 2, generator=bench.draw).repeat(1, 2).to(bench.device)
    cos, sin = angle.cos().to(bench.dtype), angle.sin().to(bench.dtype)
    norm = bench.normal(HEAD_DIM)
    out = bench.blank(ROWS, GROUP * heads * HEAD_DIM)
    length = torch.full((ROWS, heads), position, dtype=torch.int32, device=bench.device)
    parts = torch.full((ROWS, heads, splits, GROUP, HEAD_DIM), math.nan, device=bench.device)
    before = keys.clone(), values.clone()
    bench.run(
        make_call(
            name,
            32 * 1024,
            splits=splits,
            qkv=qkv,
            qkv_stride=qkv.stride(0),
            keys=keys,
            values=values,
            cos=cos,
            sin=sin,
            query_norm=norm,
            key_norm=norm,
            position_B=length[:, 0].contiguous(),
            skip_B=bench.integers(*flags),
            length_BG=length if noop else None,
            part_sums=parts,
            part_state=parts[..., :2].contiguous(),
            arrived=torch.zeros(ROWS, heads, dtype=torch.int32, device=bench.device),
            out=out,
            key_heads=heads,
            capacity=capacity,
            leaves_entry=int(not noop),
            scale=0.25,
            eps=1e-6,
        )
    )
    split = qkv.double().view(ROWS, -1, HEAD_DIM)
    query, key, value = split.split([GROUP * heads, heads, heads], 1)

    def turned(x: Tensor) -> Tensor:
        x = normed(x) * norm.double()
        half = torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), -1)
        return x * cos[position].double() + half * sin[position].double()

    every = [
        torch.cat((old[:, :, :position].double(), new.unsqueeze(2)), 2)
        for old, new in zip(before, (turned(key), value), strict=True)
    ]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        turned(query).view(ROWS, heads, GROUP, HEAD_DIM), every[0], every[1], scale=0.25
    )
    return out, wanted.flatten(1), (keys, values, every, length, before)


@pytest.mark.parametrize(("position", "splits"), [(1, 1), (37, 1), (150, 3), (2, 4)])
def test_attention(bench: Bench, position: int, splits: int) -> None:
    found, wanted, (keys, values, every, *_) = attention_case(
        bench, position, splits, False, [0, 0, 0]
    )
    assert_close(found, wanted, bench.dtype)
    assert_close(keys[:, :, position], every[0][:, :, position], bench.dtype)
    assert_close(values[:, :, position], every[1][:, :, position], bench.dtype)


@pytest.mark.parametrize("noop", [False, True])
def test_attention_of_rows_that_skip(bench: Bench, noop: bool) -> None:
    """They write no output; `project` leaves their entry, `noop` neither entry nor count."""
    found, wanted, (keys, _, every, length, before) = attention_case(bench, 37, 2, noop, [0, 1, 0])
    assert_close(found[::2], wanted[::2], bench.dtype)
    assert bool(found[1].isnan().all())
    if noop:
        assert torch.equal(keys[1], before[0][1])
        assert length[:, 0].tolist() == [38, 37, 38]
    else:
        assert_close(keys[1, :, 37], every[0][1, :, 37], bench.dtype)


def test_the_entry_that_a_token_leaves_which_skips(bench: Bench) -> None:
    found, _, (keys, values, every, _, before) = attention_case(
        bench, 37, 2, False, [1, 1, 1], "leave_entry"
    )
    assert bool(found.isnan().all())
    assert_close(keys[:, :, 37], every[0][:, :, 37], bench.dtype)
    assert_close(values[:, :, 37], every[1][:, :, 37], bench.dtype)
    assert torch.equal(keys[:, :, 38:], before[0][:, :, 38:])


@pytest.mark.parametrize(
    ("size", "count", "offers"),
    [(50, 8, 3), (3000, 64, 3), (64, 64, 1), (3000, 3, 30), (3000, 64, 100)],
)
def test_the_shortlist_is_the_highest_scores(
    bench: Bench, size: int, count: int, offers: int
) -> None:
    """With too few blocks' best to bound them, with enough, and where all are equal (row 2: the first ones)."""
    score = torch.randn(ROWS, size, generator=bench.draw)
    score[0, :5] = 9.0
    score[1] = -score[1].abs()
    score[2] = 0.5
    best = torch.stack([part.amax(-1) for part in score.tensor_split(offers, -1)])
    index, found = bench.integers(*[-1] * (ROWS * count)).view(ROWS, count), bench.integers(0, 0, 0)
    arrived = bench.integers(0, 0, 0)
    call = make_call(
        "shortlist", 4 * (2 * MOST_FOUND + 256), score_BN=score.to(bench.device), count=size, wanted=count,
        best=best.to(bench.device), offers=offers, key_BF=bench.integers(*[0] * (ROWS * MOST_FOUND)),
        place_BF=bench.integers(*[0] * (ROWS * MOST_FOUND)), found_B=found, arrived_B=arrived, index_BM=index,
    )  # fmt: skip
    for _ in range(2):
        index.fill_(-1)
        bench.run(call)
        wanted = score.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(index.long().cpu(), wanted)
        assert not found.any() and not arrived.any()


def test_noise_is_that_of_the_model(bench: Bench) -> None:
    """A gate that always answers one half skips where the model's own noise is below it."""
    seeds, width = torch.tensor([-7, 2**33 + 5, 12345]), 4
    position, layer = bench.integers(3, 70000, 9), 5
    skip_LB = torch.zeros(8, ROWS, dtype=torch.int32, device=bench.device)
    stay_LB = torch.zeros_like(skip_LB)
    zero = torch.zeros(3 * PANEL * PANEL, dtype=bench.dtype, device=bench.device)
    probs = torch.zeros(1, 8, ROWS, device=bench.device)
    skips = torch.zeros(1, 8, ROWS, dtype=torch.uint8, device=bench.device)
    bench.run(
        make_call(
            "decide",
            32 * 1024,
            front=zero,
            front_stride=8,
            reduce_width=width,
            weights=zero,
            hidden_width=2,
            clip=6.0,
            eps=1e-6,
            motion_B2=torch.zeros(ROWS, 2, device=bench.device),
            sampled=1,
            tau_B=probs,
            seed_B2=seeds.view(torch.int32).view(-1, 2).to(bench.device),
            position_B=position,
            leader=layer,
            members=2,
            free_mask=0b11,
            skip_LB=skip_LB,
            stay_LB=stay_LB,
            layers=8,
            step=bench.integers(0),
            trace_steps=1,
            prob_trace=probs,
            skip_trace=skips,
        )
    )
    wanted = gate_uniform(seeds, position.cpu().unsqueeze(1), layer)[:, 0] < 0.5
    assert skip_LB[layer].bool().tolist() == (~stay_LB[layer].bool()).tolist() == wanted.tolist()
    assert skips[0, layer].bool().tolist() == skips[0, layer + 1].bool().tolist() == wanted.tolist()
    assert probs[0, layer].tolist() == [0.5] * ROWS and not skip_LB[:5].any()


@pytest.mark.parametrize(("horizons", "rank", "mixes"), [(11, 48, True), (1, 32, True), (9, 40, False)])  # fmt: skip
def test_horizons_are_mixed_with_their_neighbours_and_pooled(
    bench: Bench, horizons: int, rank: int, mixes: bool
) -> None:
    seen = torch.randn(ROWS, horizons, rank, generator=bench.draw).to(bench.device)
    weight = torch.rand(ROWS, horizons, generator=bench.draw).to(bench.device)
    mix, bias, out = bench.normal(rank, 16, 3), bench.normal(rank), bench.blank(ROWS, rank)
    bench.run(
        make_call(
            "pool", 32 * 1024, seen_BKR=seen, weight_BK=weight, horizons=horizons, rank=rank, pooled_BR=out,
            mix=mix.permute(1, 2, 0).contiguous() if mixes else None, mix_bias=bias if mixes else None,
        )
    )  # fmt: skip
    value = seen.double()
    if mixes:
        value = torch.nn.functional.conv1d(
            value.transpose(1, 2), mix.double(), bias.double(), padding=1, groups=rank // 16
        ).transpose(1, 2)
        value = torch.nn.functional.silu(value) * weight.double().unsqueeze(-1)
    assert_close(out, value.sum(1) / (weight.double().sum(1, keepdim=True) + 1e-6), bench.dtype)


def test_closed_chunks_are_read_through_a_ring(bench: Bench) -> None:
    """A row with few of them, one whose ring is just full, one whose ring has gone round; and a null slot each."""
    ring, heads, width, buckets, before = 300, 2, 48, 4, (5, 300, 1000)
    keys, values = bench.normal(ROWS, ring, width), bench.normal(ROWS, ring, width)
    null_key, null_value, query = bench.normal(width), bench.normal(width), bench.normal(ROWS, width)  # fmt: skip
    bias_HC = bench.normal(heads, buckets)
    bucket_C = bench.integers(*[back * buckets // ring for back in range(ring)])
    scores, out = torch.zeros(ROWS, heads, 1 + ring, device=bench.device), bench.blank(ROWS, width)
    told: dict[str, Any] = {
        "front": query, "front_stride": width, "null_key": null_key, "null_value": null_value, "keys": keys,
        "values": values, "bias_HC": bias_HC, "bucket_C": bucket_C, "heads": heads, "width": width,
        "buckets": buckets, "ring_length": ring, "scale": 0.25, "before_B": bench.integers(*before),
        "score_BHC": scores, "out": out,
    }  # fmt: skip
    bench.run(make_call("chunk_scores", **told), make_call("chunk_mix", 4 * ring, **told))
    wanted = []
    for row, closed in enumerate(before):
        chunks = torch.arange(max(0, closed - ring), closed, device=bench.device)
        bias = bias_HC[:, bucket_C[closed - 1 - chunks].long()].double()
        key, value = (
            torch.cat((null.unsqueeze(0), kept[row, chunks % ring])).double().view(-1, heads, width // heads)
            for null, kept in ((null_key, keys), (null_value, values))
        )  # fmt: skip
        score = torch.einsum("hd,shd->hs", query[row].double().view(heads, -1), key) * 0.25
        score[:, 1:] += bias
        wanted.append(torch.einsum("hs,shd->hd", score.softmax(-1), value).flatten())
    assert_close(out, torch.stack(wanted), bench.dtype)
