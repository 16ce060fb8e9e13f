"""Given continuations under the gates: skips, probabilities and NLLs of hundreds of rows in a few parallel passes.

A continuation of N tokens is fed without its last one. Rows are padded behind their end, where a causal model does
not look. The token at position start + j, gate column j, is fed as continuation token j and predicts token j + 1;
token 0 is predicted by the last token of the prompt, which never skips.

Shape letters: L layers, B rows of one pass, R rows of all passes, T fed tokens, N continuation tokens, C = N − 1
gate columns, X scored tokens, V vocabulary. Rows shorter than N or C are padded; `scored` and `acted` say where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import closed_chunks
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.skip_gate import block_uniform
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.replay import batches_by_length
from fbs_rl.types import GateMode, GateRequest

_LOGIT_BYTES = 2**30
"""Logits exist this many bytes at a time."""


class Text(Protocol):
    """A prompt and what follows it."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def token_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class GivenText:
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Rows of one pass. rows: their places in the list they were taken from.

    place_BN: position whose state predicts each token, 0 on padding. target_BN: the tokens, 0 on padding.
    """

    rows: tuple[int, ...]
    ids_BT: Tensor
    start_B: Tensor
    place_BN: Tensor
    target_BN: Tensor
    scored_BN: Tensor

    @classmethod
    def of(cls, texts: Sequence[Text], rows: Sequence[int], device: torch.device) -> TextBatch:
        chosen = [texts[row] for row in rows]
        length, width = max(map(_fed, chosen)), max(len(t.token_ids) for t in chosen)
        ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
        target_BN = torch.zeros(len(rows), width, dtype=torch.long)
        for row, text in enumerate(chosen):
            ids_BT[row, : _fed(text)] = torch.tensor((*text.prompt_ids, *text.token_ids[:-1]))
            target_BN[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
        start_B = torch.tensor([len(text.prompt_ids) for text in chosen])
        tokens_B1 = torch.tensor([len(text.token_ids) for text in chosen]).unsqueeze(1)
        every_N = torch.arange(width)
        scored_BN = every_N < tokens_B1
        place_BN = (start_B.unsqueeze(1) - 1 + every_N) * scored_BN
        tensors = (ids_BT, start_B, place_BN, target_BN, scored_BN)
        return cls(tuple(rows), *(tensor.to(device) for tensor in tensors))

    @property
    def position_BT(self) -> Tensor:
        return torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device).expand_as(self.ids_BT)

    @property
    def gated_BT(self) -> Tensor:
        return self.position_BT >= self.start_B.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class PassedTexts:
    """What passes found, on the model's device.

    nll_RN: float32, nats, 0 on padding. skip_LRC: what was executed. prob_LRC: the gate's p. opens_RC, chunks_RC: as
    count_trace reads them, zero without a Chunk-Head. start_R: tokens of each prompt.
    """

    start_R: Tensor
    scored_RN: Tensor
    nll_RN: Tensor
    skip_LRC: Tensor
    prob_LRC: Tensor
    opens_RC: Tensor
    chunks_RC: Tensor

    @property
    def acted_RC(self) -> Tensor:
        return self.scored_RN[:, 1:]

    def cpu(self) -> PassedTexts:
        return PassedTexts(*(getattr(self, field.name).cpu() for field in fields(self)))


Gates = Callable[[TextBatch], GateRequest]
"""Who decides in a pass."""


def dense_gates() -> Gates:
    """Nothing is skipped."""
    return lambda batch: _request(batch, GateMode.DENSE)


def threshold_gates(tau: float, never_skip: Sequence[int] = ()) -> Gates:
    return lambda batch: _request(batch, GateMode.THRESHOLD, tau=tau, never_skip=never_skip)


def drawn_gates(
    config: FBSConfig, policy: GatePolicy, seeds: Sequence[int], never_skip: Sequence[int] = (),
    shift: float = 0.0,
) -> Gates:  # fmt: skip
    """Gates drawn from the policy. seeds: of each row. shift: added to the logit of every p before the policy.

    p with its logit shifted is above a number where p is above the number with its logit shifted back.
    """

    def request(batch: TextBatch) -> GateRequest:
        seed_B = torch.tensor([seeds[row] for row in batch.rows], device=batch.ids_BT.device)
        noise_LBT = policy.noise(block_uniform(config, seed_B, batch.position_BT))
        if shift:
            inside_LBT = torch.sigmoid(torch.logit(noise_LBT, eps=1e-7) - shift)
            never_or_always = (noise_LBT >= 1) | (noise_LBT < 0)
            noise_LBT = torch.where(never_or_always, noise_LBT, inside_LBT)
        return _request(batch, GateMode.SAMPLE, noise_LBT=noise_LBT, never_skip=never_skip)

    return request


def fixed_gates(config: FBSConfig, rate_L: Tensor, seed: int = 0) -> Gates:
    """Gates that do not look: layer l skips with probability rate_L[l], 0 and 1 included; protected layers never."""
    rate_L = rate_L.clone()
    rate_L[list(config.protected_layers)] = 0.0

    def request(batch: TextBatch) -> GateRequest:
        device = batch.ids_BT.device
        seed_B = torch.tensor([seed * 2**20 + row for row in batch.rows], device=device)
        uniform_LBT = block_uniform(config, seed_B, batch.position_BT)
        skip_LBT = (uniform_LBT < rate_L.to(device).view(-1, 1, 1)) & batch.gated_BT
        return _request(batch, GateMode.REPLAY, skip_LBT=skip_LBT)

    return request


def replayed_gates(skip_LRC: Tensor, never_skip: Sequence[int] = ()) -> Gates:
    """What was executed is executed again. skip_LRC: columns of every row of the texts, False where it has none."""

    def request(batch: TextBatch) -> GateRequest:
        place_BC, acted_BC = batch.place_BN[:, 1:], batch.scored_BN[:, 1:]
        layers, columns = len(skip_LRC), place_BC.shape[1]
        skip_LBC = skip_LRC[:, list(batch.rows), :columns] & acted_BC
        skip_LBT = skip_LBC.new_zeros(layers, *batch.ids_BT.shape)
        # Columns that a row has not are False and go to place 0, a token of the prompt.
        skip_LBT.scatter_(2, place_BC.expand(layers, -1, -1), skip_LBC)
        return _request(batch, GateMode.REPLAY, skip_LBT=skip_LBT, never_skip=never_skip)

    return request


def _request(
    batch: TextBatch, mode: GateMode, tau: float = 1.0, never_skip: Sequence[int] = (),
    skip_LBT: Tensor | None = None, noise_LBT: Tensor | None = None,
) -> GateRequest:  # fmt: skip
    tau_B = torch.full((len(batch.rows),), tau, device=batch.ids_BT.device)
    return GateRequest(
        mode, tau_B, batch.start_B, skip_LBT=skip_LBT, noise_LBT=noise_LBT, never_skip=frozenset(never_skip)
    )  # fmt: skip


@torch.no_grad()
def pass_texts(
    model: FBSForCausalLM, texts: Sequence[Text], gates: Gates, batch_tokens: int
) -> PassedTexts:
    """Every text once under the gates, at most batch_tokens at a time (a longer one alone), padding included."""
    device = model.model.embed_tokens.weight.device
    width, layers, rows = max(len(t.token_ids) for t in texts), model.config.layer_count, len(texts)
    columns = width - 1
    found = PassedTexts(
        start_R=torch.tensor([len(text.prompt_ids) for text in texts], device=device),
        scored_RN=torch.zeros(rows, width, dtype=torch.bool, device=device),
        nll_RN=torch.zeros(rows, width, device=device),
        skip_LRC=torch.zeros(layers, rows, columns, dtype=torch.bool, device=device),
        prob_LRC=torch.zeros(layers, rows, columns, device=device),
        opens_RC=torch.zeros(rows, columns, dtype=torch.bool, device=device),
        chunks_RC=torch.zeros(rows, columns, dtype=torch.long, device=device),
    )
    for part in cut_texts(texts, batch_tokens):
        _pass(model, TextBatch.of(texts, part, device), gates, found)
    return found


def _pass(model: FBSForCausalLM, batch: TextBatch, gates: Gates, found: PassedTexts) -> None:
    """Run one batch and put what it says into `found`."""
    result = model.model.run(batch.ids_BT, gates(batch))
    hidden_BTd = model.model.norm(result.state_BTd)
    row_B = torch.tensor(batch.rows, device=batch.ids_BT.device)
    scored_BN, acted_BC, place_BC = batch.scored_BN, batch.scored_BN[:, 1:], batch.place_BN[:, 1:]
    width, columns = scored_BN.shape[1], place_BC.shape[1]
    every_B1 = torch.arange(len(batch.rows), device=row_B.device).unsqueeze(1)
    state_Xd = hidden_BTd[every_B1, batch.place_BN][scored_BN]
    nll_BN = torch.zeros(scored_BN.shape, device=row_B.device)
    nll_BN[scored_BN] = token_nll(state_Xd, model.lm_head.weight, batch.target_BN[scored_BN])
    found.scored_RN[row_B, :width] = scored_BN
    found.nll_RN[row_B, :width] = nll_BN
    place_LBC = place_BC.expand(len(result.skip_LBT), -1, -1)
    found.skip_LRC[:, row_B, :columns] = result.skip_LBT.gather(2, place_LBC) & acted_BC
    found.prob_LRC[:, row_B, :columns] = result.prob_LBT.gather(2, place_LBC) * acted_BC
    if result.taps.chunks is not None:
        opens_BT = result.taps.chunks.opens_BT
        found.opens_RC[row_B, :columns] = opens_BT.gather(1, place_BC) & acted_BC
        found.chunks_RC[row_B, :columns] = closed_chunks(opens_BT).gather(1, place_BC) * acted_BC


def token_nll(state_Xd: Tensor, head_Vd: Tensor, target_X: Tensor) -> Tensor:
    """−log softmax(head·state)[target] in nats, float32 [X].

    Logits are float32 whatever the model's type: near 20, those of bf16 stand an eighth apart.
    """
    head_Vd = head_Vd.float()
    rows = max(1, _LOGIT_BYTES // (4 * len(head_Vd)))
    parts = zip(state_Xd.float().split(rows), target_X.split(rows), strict=True)
    return torch.cat([F.cross_entropy(F.linear(s, head_Vd), t, reduction="none") for s, t in parts])


def cut_texts(texts: Sequence[Text], batch_tokens: int) -> list[list[int]]:
    """Rows in batches of at most batch_tokens, padding included, neighbours in length together."""
    return batches_by_length({row: _fed(text) for row, text in enumerate(texts)}, batch_tokens)


def _fed(text: Text) -> int:
    return len(text.prompt_ids) + len(text.token_ids) - 1
