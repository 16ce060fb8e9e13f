"""One layer of the parallel pass: gate, decide, run, choose. A function of tensors, so that it compiles as one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from fbs_rl.model.attention import without_keys
from fbs_rl.model.compiled import compilable
from fbs_rl.model.decision import Verdict
from fbs_rl.model.layer import FBSLayer, Rope, straight_through, unit_norm
from fbs_rl.model.preview import Glance
from fbs_rl.model.skip_gate import Motion
from fbs_rl.model.skip_path import SkipAdapter
from fbs_rl.types import KVPolicy


class LayerPass(NamedTuple):
    """What a layer leaves behind.

    state_BTd: its output. normed_BTd: x̂ of it. key, value: [B, G, T, D] of every token. logit_BT: of the
    gate that was asked last (None: there is none). prob_BT, skip_BT: p and z, zero where nobody decides. soft_BT: z̃.
    motion_BT2: of the last executed layer. miss_BT: how far the skip path is from the layer, where training asks.
    """

    state_BTd: Tensor
    normed_BTd: Tensor
    key: Tensor
    value: Tensor
    logit_BT: Tensor | None
    prob_BT: Tensor
    skip_BT: Tensor
    soft_BT: Tensor
    motion_BT2: Tensor
    miss_BT: Tensor | None


@compilable
def pass_layer(*arguments: Any) -> LayerPass:
    """Run a layer for every token and take its output where the token does not skip; see _pass for the arguments."""
    return _pass(*arguments)


@compilable
def pass_layer_in_blocks(*arguments: Any) -> LayerPass:
    """pass_layer with a BlockMask: compiled code of its own, since one function may not see both kinds of mask."""
    return _pass(*arguments)


def _pass(
    layer: FBSLayer,
    state_BTd: Tensor,
    normed_BTd: Tensor,
    injected_BTd: Tensor,
    verdict: Verdict,
    logit_BT: Tensor | None,
    motion_BT2: Tensor,
    glance: Glance | None,
    rope: Rope,
    mask_B1TT: Tensor | BlockMask | None,
) -> LayerPass:
    """A layer for every token.

    state_BTd: h. injected_BTd: h̃. logit_BT: of the gate that an earlier layer asked last.
    """
    asked_BT = logit_BT
    if verdict.asks:
        gate = layer.skip_gate
        asked_BT = None if gate is None else gate(normed_BTd, motion_BT2, glance)
    logit_BT = logit_BT if verdict.ahead else asked_BT
    prob_BT = None if logit_BT is None else torch.sigmoid(logit_BT)
    skip_BT = verdict.skip(prob_BT)
    if skip_BT is not None and layer.config.kv_on_skip == KVPolicy.NOOP:
        assert not isinstance(mask_B1TT, BlockMask)
        mask_B1TT = without_keys(mask_B1TT, skip_BT)
    executed, key, value = layer.run_sequence(
        state_BTd, normed_BTd, injected_BTd, skip_BT, rope, mask_B1TT
    )
    moved_BT2 = Motion.between(state_BTd, executed) if layer.config.gate else motion_BT2
    miss_BT = _miss(layer, state_BTd, normed_BTd, executed)
    nothing_BT = torch.zeros_like(verdict.gated_BT)
    shown_BT = nothing_BT.float() if prob_BT is None or verdict.protected else prob_BT
    if skip_BT is None:
        normed = unit_norm(executed, layer.config.rms_norm_eps)
        soft_BT = nothing_BT.float()
        return LayerPass(
            executed,
            normed,
            key,
            value,
            asked_BT,
            shown_BT,
            nothing_BT,
            soft_BT,
            moved_BT2,
            miss_BT,
        )
    surrogate_BT = verdict.surrogate(logit_BT, prob_BT, skip_BT)
    soft_BT = skip_BT.float() + (surrogate_BT - surrogate_BT.detach())
    chosen = straight_through(
        surrogate_BT, layer.skip_path(state_BTd, normed_BTd), executed, skip_BT
    )
    motion = torch.where(skip_BT.unsqueeze(-1), motion_BT2, moved_BT2)
    normed = unit_norm(chosen, layer.config.rms_norm_eps)
    return LayerPass(
        chosen, normed, key, value, asked_BT, shown_BT, skip_BT, soft_BT, motion, miss_BT
    )


def _miss(
    layer: FBSLayer, state_BTd: Tensor, normed_BTd: Tensor, executed_BTd: Tensor
) -> Tensor | None:
    """‖skip(h) − F(h)‖² / ‖F(h) − h‖² [B, T], with gradient to the adapter alone; None where nobody asks."""
    adapter = layer.skip_path
    asked = layer.config.loss_imitation > 0 and torch.is_grad_enabled()
    if not asked or not isinstance(adapter, SkipAdapter):
        return None
    wanted_BTd, state_BTd = executed_BTd.detach().float(), state_BTd.detach()
    missed_BTd = adapter(state_BTd, normed_BTd.detach()).float() - wanted_BTd
    update_BT = (wanted_BTd - state_BTd.float()).square().sum(-1)
    return missed_BTd.square().sum(-1) / update_BT.clamp_min(1e-6)
