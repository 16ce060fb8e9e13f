"""What counted FLOPs say: the specification's figures, policies compared, traces that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from fbs_rl.model import FBSConfig
from fbs_rl.model.cost_model import CostModel
from fbs_rl.model.flops import count_trace, visible_keys
from tests.cost_variants import build
from tests.tiny import LAYERS

QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
SPEC_PREVIEWS = "every:4"
"""Layers that look ahead where the specification gives figures (its decision 2)."""
# (hidden size, feed-forward width, layers, query heads) of the other Qwen3 sizes of SPEC 6.2
OTHER_QWEN3 = {"1.7B": (2048, 6144, 28, 16), "0.6B": (1024, 3072, 28, 16)}


def qwen3_config(**options: Any) -> FBSConfig:
    geometry = {**QWEN3_4B, **{k: options.pop(k) for k in list(options) if k in QWEN3_4B}}
    return FBSConfig(**options).bound_to(Qwen3Config(**geometry))


def overhead_frac(config: FBSConfig, visible_chunks: int, close_every: int) -> float:
    """What the modules add to a dense decode at context 0, gates computed but never skipping."""
    shape = (1, close_every)
    skip_LBT = torch.zeros(config.layer_count, 1, 1, dtype=torch.bool).expand(-1, *shape)
    opens_BT = (torch.arange(close_every) == 1).view(shape)
    cost = count_trace(
        config, skip_LBT, torch.zeros(1).long(), True, torch.full(shape, visible_chunks), opens_BT
    )
    attention = cost.components["attention"]
    backbone = int(cost.backbone_flops_BT.sum()) - attention
    return (int(cost.flops_BT.sum()) - attention) / backbone - 1


def test_qwen3_4b_figures_of_the_specification() -> None:
    config = qwen3_config(paw_layers=SPEC_PREVIEWS)
    cost = CostModel.of(config)
    assert cost.head.macs == 151936 * 2560
    assert 36 * cost.layer_macs(0) + cost.head.macs == 4_022_272_000
    assert cost.key_value.macs / cost.layer_macs(0) == pytest.approx(0.052, abs=5e-4)
    assert cost.adapter.macs / cost.layer_macs(0) == pytest.approx(0.0016, abs=1e-4)
    # SPEC: 0.68 %. First without chunks, then with 100 in sight and one closing every third token.
    assert overhead_frac(config, 0, 1) == pytest.approx(0.006684, abs=1e-6)
    assert overhead_frac(config, 100, 3) == pytest.approx(0.006918, abs=1e-6)


def test_the_default_has_six_previews_less_at_4b() -> None:
    """B x̂, A_h, scores and means over 64 candidates, convolution, window; and W_up of the injection."""
    look = 2560 * 128 + 15 * 128 * 128 + 2 * 15 * 64 * 128 + 15 * 3 * 16 * 128 + 2560 * 64 + 64
    found, of_spec = qwen3_config(), qwen3_config(paw_layers=SPEC_PREVIEWS)
    assert (len(found.preview_layers), len(of_spec.preview_layers)) == (3, 9)
    less = overhead_frac(of_spec, 100, 3) - overhead_frac(found, 100, 3)
    assert less == pytest.approx(6 * (look + 128 * 2560) / 4_022_272_000, rel=1e-9)


@pytest.mark.parametrize(("size", "percent"), [("1.7B", 1.19), ("0.6B", 2.38)])
def test_smaller_qwen3_figures_of_the_specification(size: str, percent: float) -> None:
    hidden, ff, layers, heads = OTHER_QWEN3[size]
    config = qwen3_config(
        hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads,
        paw_layers=SPEC_PREVIEWS,
    )  # fmt: skip
    assert 100 * overhead_frac(config, 100, 3) == pytest.approx(percent, rel=0.05)


def skips_of(config: FBSConfig, tokens: int, ratio: float) -> Tensor:
    """[L, 1, tokens] with exactly `ratio` of all decisions skipping, none in a protected layer."""
    free = sorted(set(range(config.layer_count)) - config.protected_layers)
    skip_LT = torch.zeros(config.layer_count, tokens, dtype=torch.bool)
    order = torch.randperm(len(free) * tokens, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(len(free) * tokens, dtype=torch.bool)
    chosen[order[: round(ratio * config.layer_count * tokens)]] = True
    skip_LT[free] = chosen.view(len(free), tokens)
    return skip_LT.unsqueeze(1)


@pytest.mark.parametrize(("policy", "expected"), [("project", 0.70), ("noop", 0.68)])
def test_equation_4_understates_the_cost(policy: str, expected: float) -> None:
    config = qwen3_config(kv_on_skip=policy)
    skip_LBT = skips_of(config, tokens=100, ratio=0.36)
    cost = count_trace(config, skip_LBT, torch.tensor([200]), gates_on=True)
    assert cost.paper_ratio == pytest.approx(0.64)
    assert cost.executed_frac == pytest.approx(expected, abs=0.01)
    assert f"{cost.executed_frac:.4f}" in cost.describe() and "0.6400" in cost.describe()
    assert "lm_head" in cost.describe()


def test_noop_sees_fewer_keys_than_project() -> None:
    noop, project = qwen3_config(kv_on_skip="noop"), qwen3_config(kv_on_skip="project")
    skip_LBT, start_B = skips_of(noop, tokens=50, ratio=0.4), torch.tensor([10])
    keys_noop, keys_project = (visible_keys(c, skip_LBT, start_B) for c in (noop, project))
    assert torch.equal(keys_project, torch.arange(11, 61).expand(36, 1, 50))
    boundary = noop.boundary_layer
    assert torch.equal(keys_noop[boundary], keys_project[boundary])
    assert bool((keys_noop <= keys_project).all()) and int(keys_noop[0, 0, -1]) < 60
    attention = [
        count_trace(c, skip_LBT, start_B, True).components["attention"] for c in (noop, project)
    ]
    assert attention[0] < attention[1]


def test_what_does_not_fit_is_refused() -> None:
    config = build().config
    skip_LBT, start_B = torch.zeros(LAYERS, 2, 3, dtype=torch.bool), torch.tensor([1, 1])
    skip_LBT[config.boundary_layer] = True
    with pytest.raises(ValueError, match="never skip"):
        count_trace(config, skip_LBT, start_B, True)
    with pytest.raises(ValueError, match="8 layers"):
        count_trace(config, skip_LBT[:4], start_B, True)
    with pytest.raises(ValueError, match="one length a row"):
        count_trace(config, skip_LBT & False, start_B[:1], True)
    with pytest.raises(ValueError, match="together"):
        count_trace(config, skip_LBT & False, start_B, True, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no token"):
        count_trace(config, skip_LBT & False, start_B, True, valid_BT=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no gates"):
        count_trace(build("no gate").config, skip_LBT & False, start_B, True)
    with pytest.raises(ValueError, match="bound_to"):
        CostModel.of(FBSConfig())
