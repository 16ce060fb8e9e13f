"""Drawing tokens on the device, so that a captured graph can hold it.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fbs_rl.model.skip_gate import gate_uniform

if TYPE_CHECKING:
    from fbs_rl.decode.graph_decoder import Sampler

_PURPOSE = 0x5A317  # keeps these draws apart from those of layers


def top_p_sampler(temperature: float, top_p: float, seed_B: Tensor) -> Sampler:
    """Draws from the smallest set of tokens whose probability reaches top_p.

    A draw is a function of (seed_B, position): one seed a row, on the decoder's device. Raises ValueError for a
    temperature that is not above 0 or a top_p outside (0, 1].
    """
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature is {temperature} and top_p {top_p}; give a temperature above 0 and top_p in (0, 1], "
            f"or no sampler for the best token"
        )

    def sample(logits_BV: Tensor, position_B: Tensor) -> Tensor:
        prob_BV, order_BV = (logits_BV.float() / temperature).softmax(-1).sort(descending=True)
        outside_BV = prob_BV.cumsum(-1) - prob_BV >= top_p
        upto_BV = prob_BV.masked_fill(outside_BV, 0.0).cumsum(-1)
        uniform_B1 = gate_uniform(seed_B, position_B.unsqueeze(1), _PURPOSE)
        rank_B1 = (upto_BV <= uniform_B1 * upto_BV[:, -1:]).sum(-1, keepdim=True)
        last_B1 = (~outside_BV).sum(-1, keepdim=True) - 1
        return order_BV.gather(1, rank_B1.minimum(last_B1))[:, 0]

    return sample
