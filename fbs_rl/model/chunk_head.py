"""CH, the Chunk-Head: where phrases end, and cross-attention to the phrases read so far (SPEC 3).

The closing rule (3.2): a token labelled B, S or O, or an I that continues nothing, closes the open chunk
and opens a new one; so every token belongs to exactly one chunk, [B I I ...] or a single token. A chunk
that closes at token t is visible from token t+1 on. A chunk's summary is u = W_p·mean(x̂) over its
tokens; x̂ rather than h, because single states of pretrained models reach norms a thousand times the
usual (the first token's above all) and would own every mean they enter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbs_rl.model.compiled import compilable, compiling
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.types import B_LABEL, BIOS, I_LABEL

_ONE_HOT_ELEMENTS = 2**26


class BoundaryHead(nn.Module):
    """π_t = softmax(W_b x̂_t) over B, I, O, S, read at the boundary layer (SPEC 3.1).

    A fifth output is the blank class of the CTC loss; decisions never see it.
    """

    def __init__(self, config: FBSConfig) -> None:
        super().__init__()
        self.classify = nn.Linear(config.hidden_size, len(BIOS) + 1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.classify.weight, std=self.classify.in_features**-0.5)
        nn.init.zeros_(self.classify.bias)

    def forward(self, normed_BTd: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, T, 4], blank logits [B, T]) in float32."""
        logits_BT5 = self.classify(normed_BTd).float()
        return logits_BT5[..., : len(BIOS)], logits_BT5[..., len(BIOS)]


def close_probability(boundary_logits_BT4: Tensor) -> Tensor:
    """p_close = π(B) + π(S) + π(O) = 1 − π(I), [B, T]."""
    return 1.0 - boundary_logits_BT4.softmax(-1)[..., I_LABEL]


@dataclass(slots=True)
class Segmentation:
    """Chunks of a whole sequence.

    opens_BT: the token opens a chunk (and closes the one before it, if any). chunk_id_BT: the chunk
    that a token belongs to, −1 on padding. visible_BT: chunks closed strictly before the token, in
    its document or any earlier one. first_BT: id of the first chunk of the token's document.
    chunks: N, the most chunks of any row.
    """

    opens_BT: Tensor
    chunk_id_BT: Tensor
    visible_BT: Tensor
    first_BT: Tensor
    close_weight_BN: Tensor
    chunks: int
    _columns: Tensor | None = None

    def bias_columns(self, buckets: int, reach: int) -> Tensor:
        """bias_columns of every token and chunk; worked out by the first reader, the same for all."""
        if self._columns is None:
            visible_BT1 = self.visible_BT.unsqueeze(-1)
            index_N = torch.arange(self.chunks, device=self.visible_BT.device)
            distance_BTN = visible_BT1 - 1 - index_N
            in_reach_BTN = (distance_BTN >= 0) & (distance_BTN < reach)
            in_reach_BTN &= distance_BTN < visible_BT1 - self.first_BT.unsqueeze(-1)
            self._columns = bias_columns(distance_BTN, in_reach_BTN, buckets, reach)
        return self._columns


def segment(
    boundary_logits_BT4: Tensor, valid_BT: Tensor | None = None, document_BT: Tensor | None = None
) -> Segmentation:
    """Apply the closing rule to whole sequences at once.

    An I continues the open chunk iff the last label before it that is no I is a B, in the same
    document; that label is found with a running maximum over indices, so no loop over tokens is needed.
    """
    label_BT = boundary_logits_BT4.argmax(-1)
    length = label_BT.shape[1]
    index_T = torch.arange(length, device=label_BT.device)
    valid = torch.ones_like(label_BT, dtype=torch.bool) if valid_BT is None else valid_BT
    starts_BT = valid & (valid.long().cumsum(1) == 1)
    if document_BT is not None:
        starts_BT = starts_BT | (valid & (document_BT != F.pad(document_BT, (1, -1), value=-1)))
    # A first token labelled I continues nothing: for what follows it counts as S. Padding is no anchor.
    anchor_BT = valid & ((label_BT != I_LABEL) | starts_BT)
    last_anchor_BT = torch.where(anchor_BT, index_T, -1).cummax(dim=1).values.clamp_min(0)
    continues_BT = ~anchor_BT & (label_BT.gather(1, last_anchor_BT) == B_LABEL)
    opens_BT = valid & ~continues_BT
    count_BT = opens_BT.long().cumsum(1)
    chunk_id_BT = torch.where(valid, count_BT - 1, -1)
    # At token t, count_t − 1 chunks are closed by t itself or earlier; the one t closes shows from t+1 on.
    visible_BT = (F.pad(count_BT, (1, -1)) - 1).clamp_min(0)
    start_id_BT = torch.where(starts_BT, chunk_id_BT, 0)
    first_BT = start_id_BT.cummax(dim=1).values
    chunks = _room(count_BT) if length else 0
    return Segmentation(
        opens_BT,
        chunk_id_BT,
        visible_BT,
        first_BT,
        _close_weights(boundary_logits_BT4, opens_BT, count_BT, chunks),
        chunks,
    )


def _close_weights(
    boundary_logits_BT4: Tensor, opens_BT: Tensor, count_BT: Tensor, chunks: int
) -> Tensor:
    """ĉ_j = 1 + p_close − sg(p_close) at the token that closes chunk j (SPEC 3.4): value 1, gradient to π."""
    batch = opens_BT.shape[0]
    weight_BN = torch.ones(batch, chunks + 1, device=opens_BT.device)
    if boundary_logits_BT4.requires_grad:
        prob_BT = close_probability(boundary_logits_BT4)
        # The token that opens chunk j+1 closes chunk j; slot `chunks` collects what closes nothing.
        slot_BT = torch.where(opens_BT & (count_BT >= 2), count_BT - 2, chunks)
        weight_BN = weight_BN.scatter(1, slot_BT, 1.0 + (prob_BT - prob_BT.detach()))
    return weight_BN[:, :chunks]


def chunk_means(values_BTW: Tensor, segmentation: Segmentation) -> Tensor:
    """Mean of `values` over each chunk: [B, N, W], zeros for chunks that a row does not have.

    Differences of running sums, in float64 so that a difference of two long sums keeps float32 accuracy.
    """
    if compiling():
        return _means_by_product(values_BTW, segmentation)
    batch, length, width = values_BTW.shape
    member_BT = segmentation.chunk_id_BT >= 0
    total_BTW = (values_BTW.double() * member_BT.unsqueeze(-1)).cumsum(1)
    ids_BT = segmentation.chunk_id_BT.clamp_min(0)
    size_BN = torch.zeros(batch, segmentation.chunks, device=values_BTW.device, dtype=torch.float64)
    size_BN.scatter_add_(1, ids_BT, member_BT.double())
    # Index of the last token of each chunk; the sum up to it minus the sum up to the chunk before.
    last_BN = torch.zeros(batch, segmentation.chunks, dtype=torch.long, device=values_BTW.device)
    index_BT = torch.where(member_BT, torch.arange(length, device=values_BTW.device), 0)
    last_BN.scatter_reduce_(1, ids_BT, index_BT, reduce="amax")
    upto_BNW = total_BTW.gather(1, last_BN.unsqueeze(-1).expand(-1, -1, width))
    sums_BNW = upto_BNW - F.pad(upto_BNW, (0, 0, 1, -1))
    present_BN1 = (size_BN > 0).unsqueeze(-1)
    means_BNW = torch.where(present_BN1, sums_BNW / size_BN.clamp_min(1).unsqueeze(-1), 0.0)
    return means_BNW.to(values_BTW.dtype)


def _means_by_product(values_BTW: Tensor, segmentation: Segmentation) -> Tensor:
    """chunk_means as a product with who belongs where; a GPU does that faster than it adds up in float64."""
    every_N1 = torch.arange(segmentation.chunks, device=values_BTW.device).unsqueeze(-1)
    member_BNT = segmentation.chunk_id_BT.unsqueeze(1) == every_N1
    size_BN1 = member_BNT.sum(-1, keepdim=True).clamp_min(1)
    sums_BNW = torch.bmm(member_BNT.to(values_BTW.dtype), values_BTW)
    return (sums_BNW / size_BN1).to(values_BTW.dtype)


class ChunkReader(nn.Module):
    """Cross-attention of one layer to the closed chunks: h̃ = h + s_c·W_o·o, with s_c = 0 at the start.

    Keys and values come from the summaries u plus one learned null slot; scores get a learned bias per
    head and bucketed distance in chunks (SPEC 3.3).
    """

    def __init__(self, config: FBSConfig) -> None:
        super().__init__()
        width = config.chunk_width
        self.heads, self.cap, self.buckets = (
            config.chunk_heads,
            config.chunk_cache,
            config.chunk_distance_buckets,
        )
        self.summarise = nn.Linear(config.hidden_size, width, bias=False)  # W_p
        self.query = nn.Linear(config.hidden_size, width, bias=False)  # W_q
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, config.hidden_size, bias=False)  # W_o
        self.null_key = nn.Parameter(torch.empty(width))
        self.null_value = nn.Parameter(torch.empty(width))
        self.distance_bias = nn.Parameter(torch.empty(self.heads, self.buckets))
        self.consistency = nn.Linear(
            width, config.hidden_size, bias=False
        )  # W_s, read by L_cons only
        self.strength = nn.Parameter(torch.empty(1))  # s_c

    def reset_parameters(self) -> None:
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(self.null_key, std=1.0)
        for zeroed in (self.null_value, self.distance_bias, self.strength):
            nn.init.zeros_(zeroed)

    def read_sequence(
        self, normed_BTd: Tensor, segmentation: Segmentation
    ) -> tuple[Tensor, Tensor]:
        """(the addition to h̃ [B, T, d], summaries u [B, N, width]) for whole sequences."""
        summary_BNW = chunk_means(self.summarise(normed_BTd), segmentation)
        summary_BNW = summary_BNW * segmentation.close_weight_BN.unsqueeze(-1).to(summary_BNW.dtype)
        column = segmentation.bias_columns(self.buckets, self.cap)
        addition = _attend(self, normed_BTd, self.key(summary_BNW), self.value(summary_BNW), column)
        return addition, summary_BNW

    def attend(
        self, normed_BTd: Tensor, key_BNW: Tensor, value_BNW: Tensor, column_BTN: Tensor
    ) -> Tensor:
        """s_c·W_o·softmax(q·k + bias)·v over the null slot and the chunks; column_BTN: of bias_columns."""
        query = self._split(self.query(normed_BTd))
        key = self._split(self._with_null(key_BNW, self.null_key))
        value = self._split(self._with_null(value_BNW, self.null_value))
        # Behind the buckets: the null slot, which has no distance, and what is out of reach.
        table_HC = F.pad(F.pad(self.distance_bias, (0, 1)), (0, 1), value=float("-inf"))
        bias_BHTN = _TableLookup.apply(table_HC, column_BTN)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias_BHTN.to(query.dtype)
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
        return self.strength * self.out(mixed.transpose(1, 2).flatten(-2))

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def _with_null(entries_BNW: Tensor, null_W: Tensor) -> Tensor:
        return torch.cat((null_W.expand(entries_BNW.shape[0], 1, -1), entries_BNW), dim=1)


def _room(count_BT: Tensor) -> int:
    """Chunks to make room for.

    Compiled code knows a few sizes only, since it is made anew for each: one less than a power of two, for the null
    slot joins them and aligned products are faster. Where a CUDA graph is captured nobody can look how many there are:
    as many as tokens.
    """
    if count_BT.is_cuda and torch.cuda.is_current_stream_capturing():
        return count_BT.shape[1]
    chunks = int(count_BT.max())
    return max(64, 1 << chunks.bit_length()) - 1 if compiling() else max(chunks, 1)


@compilable
def _attend(reader: ChunkReader, *arguments: Tensor) -> Tensor:
    """reader.attend(*arguments)."""
    return reader.attend(*arguments)


class _TableLookup(torch.autograd.Function):
    """table[:, column] as [B, H, T, N], with a backward that sums by products.

    The library's backward of indexing adds one element after the other where an index occurs often, which
    took 500 ms for 8 M look-ups into 34 columns on an H100.
    """

    @staticmethod
    def forward(ctx: Any, table_HC: Tensor, column_BTN: Tensor) -> Tensor:
        ctx.save_for_backward(column_BTN)
        ctx.columns = table_HC.shape[1]
        return table_HC[:, column_BTN].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_BHTN,), (column_BTN,) = gradients, ctx.saved_tensors
        columns = -(-ctx.columns // 8) * 8  # products with aligned rows are faster
        every_C = torch.arange(columns, device=column_BTN.device)
        total_HC = gradient_BHTN.new_zeros(gradient_BHTN.shape[1], columns, dtype=torch.float32)
        per_token = column_BTN.shape[0] * column_BTN.shape[2] * columns
        tokens = max(1, _ONE_HOT_ELEMENTS // per_token)
        pieces = zip(gradient_BHTN.split(tokens, 2), column_BTN.split(tokens, 1), strict=True)
        for gradient, column in pieces:
            one_hot = (column.unsqueeze(-1) == every_C).to(gradient.dtype)
            total_HC += torch.einsum("bhtn,btnc->hc", gradient, one_hot)
        return total_HC[:, : ctx.columns].to(gradient_BHTN.dtype), None


def bias_columns(distance_BTN: Tensor, in_reach_BTN: Tensor, buckets: int, reach: int) -> Tensor:
    """Column of a reader's bias table for the null slot, which comes first, and each chunk: [B, T, 1 + N]."""
    column_BTN = torch.where(
        in_reach_BTN, distance_bucket(distance_BTN, buckets, reach), buckets + 1
    )
    return F.pad(column_BTN, (1, 0), value=buckets)


def distance_bucket(distance: Tensor, buckets: int, reach: int) -> Tensor:
    """Bucket of a distance >= 0 in chunks: exact below buckets/2, then logarithmic up to `reach`.

    The scheme of T5's relative position buckets (Raffel et al. 2020, section 2.1), one-sided.
    """
    exact = max(buckets // 2, 1)
    distance = distance.clamp_min(0)
    ratio = (distance.clamp_min(1).float() / exact).log() / math.log(max(reach, exact + 1) / exact)
    far = exact + (ratio * (buckets - exact)).long()
    return torch.where(distance < exact, distance, far).clamp(0, buckets - 1)
