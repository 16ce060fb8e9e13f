"""Baselines that any learned gate must beat at equal skip: random skipping and dropping fixed layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.skip_gate import gate_uniform


def random_skip(
    config: FBSConfig, sequences_NT: Tensor, decode_start: int, skip_ratio: float, seed: int = 0
) -> Tensor:
    """[L, N, T] bool: every layer that may skip does so with one probability, giving `skip_ratio` over all layers."""
    free = config.layer_count - len(config.protected_layers)
    if not 0 <= skip_ratio * config.layer_count <= free:
        raise ValueError(
            f"a skip ratio of {skip_ratio} is more than the layers that may skip "
            f"({free} of {config.layer_count}), or below 0"
        )
    prob = skip_ratio * config.layer_count / max(free, 1)
    count, length = sequences_NT.shape
    position_NT = torch.arange(length).expand(count, -1)
    seed_N = torch.arange(count) + (seed << 20)
    layers = [
        (gate_uniform(seed_N, position_NT, layer) < prob)
        & (position_NT >= decode_start)
        & (layer not in config.protected_layers)
        for layer in range(config.layer_count)
    ]
    return torch.stack(layers)


def static_skip(
    config: FBSConfig, sequences_NT: Tensor, decode_start: int, layers: list[int]
) -> Tensor:
    """[L, N, T] bool: these layers are dropped for every token from `decode_start` on."""
    skip_LNT = torch.zeros(config.layer_count, *sequences_NT.shape, dtype=torch.bool)
    skip_LNT[layers, :, decode_start:] = True
    return skip_LNT


@torch.inference_mode()
def removal_harm(
    model: FBSForCausalLM,
    sequences_NT: Tensor,
    decode_start: int,
    on_layer: Callable[[int], None] | None = None,
) -> Tensor:
    """KL(dense || layer l dropped) in nats at every token from `decode_start` on: [L, N, T - decode_start].

    One forward a layer. Protected layers get NaN. on_layer is told each layer as it is done.
    """
    ids_NT = sequences_NT.to(model.device)
    dense = model(ids_NT, gates="dense").logits[:, decode_start:].float().log_softmax(-1)
    prob = dense.exp()
    harm = torch.full((model.config.layer_count, *dense.shape[:2]), float("nan"))
    for layer in range(model.config.layer_count):
        if layer not in model.config.protected_layers:
            skip = static_skip(model.config, sequences_NT, decode_start, [layer]).to(model.device)
            out = model(ids_NT, gates="replay", skip=skip, decode_start=decode_start)
            without = out.logits[:, decode_start:].float().log_softmax(-1)
            harm[layer] = (prob * (dense - without)).sum(-1).cpu()
        if on_layer is not None:
            on_layer(layer)
    return harm
