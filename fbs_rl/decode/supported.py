"""What the graph decoder does not do, each refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fbs_rl.decode.step_buffers import MOST_FOUND
from fbs_rl.model.kernel_limits import kernel_limits
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.types import GateInputs, GateMode

_MOST_RANK = 256  # numbers of a preview, one a thread
_MOST_GATE_FEATURES = 512
_MOST_HORIZONS = 64


def check_supported(model: FBSForCausalLM, mode: GateMode, tokens: int) -> None:
    """Raise ValueError for the first thing about the model or the call that the graph decoder cannot do."""
    config = model.config
    if mode is GateMode.REPLAY:
        raise ValueError(
            'the graph decoder does not replay actions; use the parallel forward with gates="replay"'
        )
    if mode is not GateMode.DENSE and not config.gate:
        raise ValueError(f'gates is "{mode}" but this model was made without gates')
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"{tokens} tokens are more than the model's context of {config.max_position_embeddings}"
        )
    for reason in _reasons(model):
        raise ValueError(
            f"the graph decoder does not support {reason}; decode with fbs_rl.decoding"
        )


def _reasons(model: FBSForCausalLM) -> Iterator[str]:
    config = model.config
    assert config.num_key_value_heads is not None
    if model.dtype not in (torch.float32, torch.bfloat16):
        yield f"weights in {model.dtype}, only float32 and bfloat16"
    yield from kernel_limits(config)
    if config.paw:
        if config.paw_shortlist > MOST_FOUND:
            yield f"a shortlist of more than {MOST_FOUND} tokens"
        if config.paw_rank > _MOST_RANK:
            yield f"a paw_rank of more than {_MOST_RANK}"
        if config.paw_horizon > _MOST_HORIZONS:
            yield f"more than {_MOST_HORIZONS} horizons"
    chunk_head = config.chunk_width // config.chunk_heads
    if config.chunk and (chunk_head > 256 or chunk_head % 8):
        yield f"chunk heads of {chunk_head} numbers, only multiples of 8 up to 256"
    features = config.gate_residual_width + config.gate_preview_width + 3
    if config.gate and config.gate_inputs == GateInputs.BOTH and features > _MOST_GATE_FEATURES:
        yield f"more than {_MOST_GATE_FEATURES} features of a gate"
