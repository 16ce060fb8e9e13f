"""A model whose weights ZeRO-3 spreads over the ranks: which of them stay whole, and how to get all together."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.training.parameters import is_sharded


class ShardedModel:
    """Made of `model` before DeepSpeed takes it, as a pattern for whole copies.

    The pattern has no weights; modules, buffers and options are those of `model`.
    """

    def __init__(self, model: FBSForCausalLM) -> None:
        empty = {id(p): _like(p, torch.empty_like(p, device="meta")) for p in model.parameters()}
        self._pattern = copy.deepcopy(model, {**empty, id(model.config): model.config})

    def keep_rest_whole(self, engine: Any) -> None:
        """Let every rank keep what is not sharded: gathered now and after each step, never released.

        DeepSpeed chooses that by size alone; its list of such parameters is what its optimizer gathers. Its hooks
        stay where there is something to gather: elsewhere they cost time, and want outputs they can look into.
        """
        kept, hooked = engine.optimizer.persistent_parameters, set()
        for prefix, module in engine.module.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                parameter.ds_persist = not is_sharded(name, len(parameter.ds_shape))
                if not parameter.ds_persist:
                    hooked |= {id(module._forward_pre_hooks), id(module._forward_hooks)}
        kept += [p for p in engine.module.parameters() if p.ds_persist]
        offload = engine.optimizer.parameter_offload
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            if id(hook.hooks_dict_ref()) not in hooked:
                hook.remove()
        kept[0].all_gather(kept)

    def whole(self, live: FBSForCausalLM) -> FBSForCausalLM:
        """A copy of `live`, as it is now, that DeepSpeed knows nothing of. All ranks must call."""
        import deepspeed

        config = live.config
        memo: dict[int, Any] = {id(config): config}
        named = zip(self._pattern.named_parameters(), live.named_parameters(), strict=True)
        for (name, empty), (live_name, parameter) in named:
            assert name == live_name
            with deepspeed.zero.GatheredParameters([parameter]):
                memo[id(empty)] = _like(parameter, parameter.detach().clone())
        return copy.deepcopy(self._pattern, memo)


def _like(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=parameter.requires_grad)
