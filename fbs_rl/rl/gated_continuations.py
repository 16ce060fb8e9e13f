"""What the gated policy writes: many continuations at once, with the skips that were executed while writing.

The prompt is read with nothing skipped; gates act from the first continuation token that is fed. Gates and tokens are
drawn as functions of a row's seed and of positions alone, so rows may be cut into batches in any way; products of
other batch sizes differ in their last bits. Rows that skip a layer are masked: nothing is saved, and a GPU with
hundreds of rows waits for the host once a token, to be told whether all have ended.

Shape letters: L layers, B rows of one batch, R rows of all batches, T tokens of the prompts, padded on the left,
N continuation tokens, C = N − 1 gate columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.decode.sampling import top_p_sampler
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.skip_gate import block_uniform
from fbs_rl.rl.dense_continuations import left_padded
from fbs_rl.rl.parallel_pass import GivenText
from fbs_rl.rl.replay import batches_by_length
from fbs_rl.rl.reward import SegmentKind
from fbs_rl.rl.rollout import RolloutSettings, gate_seed, token_seed
from fbs_rl.types import GateMode, GateRequest, SkippingRows


@dataclass(frozen=True, slots=True)
class GatedTexts:
    """texts: of each row. skip_LRC: what was executed while they were written, on the model's device.

    Column c is what happened when token c was fed; False behind a row's last column.
    """

    texts: tuple[GivenText, ...]
    skip_LRC: Tensor


@torch.no_grad()
def write_gated(
    model: FBSForCausalLM, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], settings: RolloutSettings,
    batch_tokens: int,
) -> GatedTexts:  # fmt: skip
    """A continuation of each prompt: up to settings.max_new_tokens (1 or more), the token that ends it included.

    seeds: of each row's sample, that gates and tokens are drawn with. Gates: settings.policy, or thresholds at
    settings.tau. Tokens: the best one at temperature 0, else drawn from the softmax of float32 logits.
    batch_tokens: of rows that are written together, padding included (a longer row alone).
    """
    most, device = settings.max_new_tokens, model.model.embed_tokens.weight.device
    skip_LRC = torch.zeros(
        model.config.layer_count, len(prompts), most - 1, dtype=torch.bool, device=device
    )
    texts: dict[int, GivenText] = {}
    length = {row: len(prompt) + most for row, prompt in enumerate(prompts)}
    for rows in batches_by_length(length, batch_tokens):
        token_BN, skip_LBC = _write_batch(
            model, [prompts[row] for row in rows], [seeds[row] for row in rows], settings
        )
        tokens_B = _until_end(token_BN, settings.end_ids)
        columns = skip_LBC.shape[2]
        fed_BC = torch.arange(columns, device=device) < tokens_B.unsqueeze(1) - 1
        skip_LRC[:, rows, :columns] = skip_LBC & fed_BC
        for row, ids, count in zip(rows, token_BN.tolist(), tokens_B.tolist(), strict=True):
            texts[row] = GivenText(prompts[row], tuple(ids[:count]))
    return GatedTexts(tuple(texts[row] for row in range(len(prompts))), skip_LRC)


def _write_batch(
    model: FBSForCausalLM, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], settings: RolloutSettings
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens [B, N], skips [L, B, C]) of one batch, until every row has ended; what follows an end is arbitrary."""
    device = model.model.embed_tokens.weight.device
    ids_BT, mask_BT = (part.to(device) for part in left_padded(prompts))
    length_B = mask_BT.sum(1)
    gates = _step_gates(model.config, settings, seeds, length_B)
    choose = _token_chooser(settings.temperature, seeds, device)
    # As scored texts have it: near 20, logits of bf16 stand an eighth apart.
    head_Vd = model.lm_head.weight.float()
    ends = torch.tensor(settings.end_ids, dtype=torch.long, device=device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = FBSCache(model.config.layer_count)
    dense = GateRequest(GateMode.DENSE, torch.ones_like(length_B), length_B)
    result = model.model.run(ids_BT, dense, mask_BT, cache=cache)
    tokens, skips = [], [result.skip_LBT[:, :, :0]]
    while True:
        state_Bd = model.model.norm(result.state_BTd[:, -1]).float()
        token_B = choose(F.linear(state_Bd, head_Vd), length_B + len(tokens))
        tokens.append(token_B)
        ended_B |= (token_B.unsqueeze(1) == ends).any(1)
        if len(tokens) == settings.max_new_tokens or bool(ended_B.all()):
            return torch.stack(tokens, 1), torch.cat(skips, 2)
        result = model.model.run(
            token_B.unsqueeze(1), gates(len(tokens) - 1), cache=cache, skipping=SkippingRows.MASKED
        )
        skips.append(result.skip_LBT)


def _step_gates(
    config: FBSConfig, settings: RolloutSettings, seeds: Sequence[int], length_B: Tensor
) -> Callable[[int], GateRequest]:
    """Who decides in each gate column: the draws that parallel passes and engines make at the same positions."""
    tau_B = torch.full(length_B.shape, settings.tau, device=length_B.device)
    never_skip = frozenset(settings.never_skip)
    if settings.policy is None:
        thresholds = GateRequest(GateMode.THRESHOLD, tau_B, length_B, never_skip=never_skip)
        return lambda column: thresholds
    drawn = [gate_seed(seed, SegmentKind.SELF) for seed in seeds]
    seed_B = torch.tensor(drawn, device=length_B.device)
    column_C = torch.arange(settings.max_new_tokens - 1, device=length_B.device)
    position_BC = length_B.unsqueeze(1) + column_C
    noise_LBC = settings.policy.noise(block_uniform(config, seed_B, position_BC))
    sampled = GateRequest(GateMode.SAMPLE, tau_B, length_B, never_skip=never_skip)
    return lambda column: replace(sampled, noise_LBT=noise_LBC[:, :, column : column + 1])


def _token_chooser(
    temperature: float, seeds: Sequence[int], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Tokens [B] from logits [B, V] and the positions [B] that they will take."""
    if temperature == 0:
        return lambda logits_BV, position_B: logits_BV.argmax(-1)
    seed_B = torch.tensor([token_seed(seed) for seed in seeds], device=device)
    return top_p_sampler(temperature, 1.0, seed_B)


def _until_end(token_BN: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """Tokens of each row up to its first end, the end included: [B]."""
    ends = torch.tensor(end_ids, dtype=torch.long, device=token_BN.device)
    is_end_BN = (token_BN.unsqueeze(2) == ends).any(2)
    first_B = is_end_BN.int().argmax(1) + 1
    return torch.where(is_end_BN.any(1), first_B, token_BN.shape[1])
