"""Options of a model that no decoder with kernels of its own computes, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.types import Compression


def kernel_limits(config: FBSConfig) -> Iterator[str]:
    """What of the configuration the kernels do not know; nothing where they know all of it."""
    if config.hidden_act != "silu":
        yield f"the activation {config.hidden_act!r}, only 'silu'"
    if config.mlp_bias and config.backbone_type == "llama":
        yield "biases in the MLP"
    if config.segment_position:
        yield "segment_position"
    if config.paw and config.paw_embed_space == "full":
        yield 'paw_embed_space "full"'
    if config.paw and config.paw_compression not in (Compression.CONV, Compression.MEAN):
        yield f'paw_compression "{config.paw_compression}"'
