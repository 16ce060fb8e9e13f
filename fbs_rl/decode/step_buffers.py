"""Memory of one decoding step that never moves, so that a captured graph can use it again and again.

Letters: B rows, L layers, S places of a cache, D head size, d hidden size, T steps that a trace can hold, K horizons,
R rank, M shortlist, N preview vocabulary, C ring of chunks, W chunk width. Flags and counts are int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fbs_rl.model.chunk_head import distance_bucket
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.types import Compression, KVPolicy

_MOST_SPLITS = 16  # MOST_PARTS of kernels/attention.cu
MOST_FOUND = 1024  # FOUND_KEYS of kernels/preview.cu


@dataclass(frozen=True, slots=True)
class Room:
    """How much to make room for. tokens: prompt and answer of a row; steps: of a trace."""

    rows: int
    tokens: int
    steps: int
    device: torch.device
    dtype: torch.dtype

    def numbers(self, *shape: int) -> Tensor:
        """Zeros of the model's type."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def bytes(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)


@dataclass(frozen=True, slots=True)
class Pages:
    """Entries that somebody else keeps. keys, values: by layer [pages, entries of a page, key heads, D]; page_BP: the
    pages of each row, in their order."""

    keys: list[Tensor]
    values: list[Tensor]
    page_BP: Tensor


@dataclass(slots=True)
class TokenBuffers:
    """token_B is fed next, at position_B. forced_steps: so many steps take their token from forced_TB."""

    token_B: Tensor
    position_B: Tensor
    step: Tensor
    forced_steps: Tensor
    forced_TB: Tensor
    token_TB: Tensor
    logits_BV: Tensor
    best: Tensor
    best_index: Tensor

    @classmethod
    def empty(cls, room: Room, config: FBSConfig, blocks: int) -> TokenBuffers:
        rows, steps = room.rows, room.steps
        return cls(
            room.integers(rows),
            room.integers(rows),
            room.integers(1),
            room.integers(1),
            room.integers(steps, rows),
            room.integers(steps, rows),
            room.numbers(rows, config.vocab_size),
            room.floats(blocks, rows),
            room.integers(blocks, rows),
        )


@dataclass(slots=True)
class LayerBuffers:
    """state: h of a layer, of the one behind and of the one in front, in turns. injected_Bd: h̃. middle_Bd: behind
    attention. side_BX: queries, keys, values and what the front product makes, in turns: a layer that is skipped
    leaves its entry while the next one begins. front_at: where the last of these lies.

    keys, values: per layer [B, key heads, S, D], or where page_BP is not None as Pages has them. length_LBG: entries,
    where skipped tokens leave none; else None.
    """

    state: tuple[Tensor, Tensor, Tensor]
    injected_Bd: Tensor
    middle_Bd: Tensor
    side_BX: tuple[Tensor, Tensor]
    front_at: int
    attended_BX: Tensor
    active_BI: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    page_BP: Tensor | None
    length_LBG: Tensor | None
    cos_SD: Tensor
    sin_SD: Tensor
    part_sums: Tensor
    part_state: Tensor
    arrived: Tensor
    splits: int
    qkv_bias: dict[int, Tensor]

    @classmethod
    def empty(
        cls,
        room: Room,
        model: FBSForCausalLM,
        front: int,
        multiprocessors: int,
        pages: Pages | None,
    ) -> LayerBuffers:
        config, rows = model.config, room.rows
        assert config.head_dim is not None and config.num_key_value_heads is not None
        hidden, groups, size = config.hidden_size, config.num_key_value_heads, config.head_dim
        heads, layers = config.num_attention_heads, config.layer_count
        front_at = (heads + 2 * groups) * size
        splits = _attention_splits(rows * groups, room.tokens, multiprocessors)
        cache = (rows, groups, room.tokens, size)
        positions = torch.arange(room.tokens, device=room.device).unsqueeze(0)
        cos, sin = model.model.rotary_emb(room.numbers(1, 1, hidden), positions)
        noop = config.kv_on_skip == KVPolicy.NOOP
        return cls(
            state=(
                room.numbers(rows, hidden),
                room.numbers(rows, hidden),
                room.numbers(rows, hidden),
            ),
            injected_Bd=room.numbers(rows, hidden),
            middle_Bd=room.numbers(rows, hidden),
            side_BX=(room.numbers(rows, front_at + front), room.numbers(rows, front_at + front)),
            front_at=front_at,
            attended_BX=room.numbers(rows, heads * size),
            active_BI=room.numbers(rows, config.intermediate_size),
            keys=pages.keys if pages else [room.numbers(*cache) for _ in range(layers)],
            values=pages.values if pages else [room.numbers(*cache) for _ in range(layers)],
            page_BP=pages.page_BP if pages else None,
            length_LBG=room.integers(layers, rows, groups) if noop else None,
            cos_SD=cos[0].contiguous(),
            sin_SD=sin[0].contiguous(),
            part_sums=room.floats(rows, groups, splits, heads // groups, size),
            part_state=room.floats(rows, groups, splits, heads // groups, 2),
            arrived=room.integers(rows, groups),
            splits=splits,
            qkv_bias={i: bias for i, bias in _biases(model, front)},
        )

    def qkv(self, layer: int) -> Tensor:
        """Queries, keys and values of a layer [B, X]."""
        return self.side_BX[layer % 2][:, : self.front_at]

    def front(self, layer: int) -> Tensor:
        """What a layer's front product makes [B, F]."""
        return self.side_BX[layer % 2][:, self.front_at :]


def _biases(model: FBSForCausalLM, front: int) -> Iterator[tuple[int, Tensor]]:
    """Biases of queries, keys and values behind each other, then zeros for the front, of the layers that have them."""
    for layer in model.model.fbs_layers():
        parts = [getattr(layer.self_attn, f"{name}_proj").bias for name in "qkv"]
        if parts[0] is not None:
            none = parts[0].new_zeros(front)
            yield layer.index, torch.cat([*(part.detach() for part in parts), none])


def _attention_splits(heads: int, tokens: int, multiprocessors: int) -> int:
    """Parts that a row's entries are cut into: about one a multiprocessor, 32 entries or more each."""
    return max(1, min(multiprocessors // heads, -(-tokens // 32), _MOST_SPLITS))


@dataclass(slots=True)
class GateBuffers:
    """Decisions of the step and of the steps before it: of layers that share one, at the first of them. stay_LB: 1
    where a row does not skip. guess_LB: 1 in all rows of a layer that all of them skipped at the token before, or skip
    now, where gates decide a layer ahead; doubt_LB: the other way round. unwanted_B: ones. bar_LB: what a layer's
    probability has to reach, instead of tau_B. seed_B2: low and high word of each row's seed."""

    skip_LB: Tensor
    stay_LB: Tensor
    guess_LB: Tensor
    doubt_LB: Tensor
    unwanted_B: Tensor
    motion_B2: Tensor
    tau_B: Tensor
    seed_B2: Tensor
    prob_TLB: Tensor
    skip_TLB: Tensor
    bar_LB: Tensor | None

    @classmethod
    def empty(cls, room: Room, config: FBSConfig, bars: bool) -> GateBuffers:
        layers, rows = config.layer_count, room.rows
        return cls(
            room.integers(layers, rows),
            room.integers(layers, rows),
            room.integers(layers, rows),
            room.integers(layers, rows),
            room.integers(rows).fill_(1),
            room.floats(rows, 2),
            room.floats(rows),
            room.integers(rows, 2),
            room.floats(room.steps, layers, rows),
            room.bytes(room.steps, layers, rows),
            room.floats(layers, rows) if bars else None,
        )


@dataclass(slots=True)
class PreviewBuffers:
    """As in Scores, Shortlist, Look and Pool of the kernels.

    table_NR, mean_map_RR, prior_N: what the preview head's weights determine; taps: by PAW layer, the convolution's
    weights [16, 3, R]. copy_weights() follows them.
    """

    score_BN: Tensor
    best: Tensor
    key_BF: Tensor
    place_BF: Tensor
    found_B: Tensor
    arrived_B: Tensor
    index_BM: Tensor
    seen_BKR: Tensor
    weight_BK: Tensor
    pooled_BR: Tensor
    entropy_B: Tensor
    table_NR: Tensor
    mean_map_RR: Tensor
    prior_N: Tensor
    taps: dict[int, Tensor]

    @classmethod
    def empty(cls, room: Room, config: FBSConfig, blocks: int) -> PreviewBuffers:
        rows, rank, size = room.rows, config.paw_rank, config.preview_vocab_size
        return cls(
            room.floats(rows, size),
            room.floats(blocks, rows),
            room.integers(rows, MOST_FOUND),
            room.integers(rows, MOST_FOUND),
            room.integers(rows),
            room.integers(rows),
            room.integers(rows, config.paw_shortlist),
            room.floats(rows, config.paw_horizon, rank),
            room.floats(rows, config.paw_horizon),
            room.numbers(rows, config.pooled_width),
            room.floats(rows),
            room.numbers(size, rank),
            room.numbers(rank, rank),
            room.floats(size),
            {layer: room.numbers(16, 3, rank) for layer in config.preview_layers},
        )

    @torch.no_grad()
    def copy_weights(self, model: FBSForCausalLM) -> None:
        head = model.model.preview
        assert head is not None
        self.table_NR.copy_(head.reduced_embedding(model.model.embed_tokens.weight))
        self.mean_map_RR.copy_(head.horizon_maps.mean(0))
        self.prior_N.copy_(head.log_prior_N)
        for layer in model.model.fbs_layers():
            if layer.paw is not None and layer.paw.compression is Compression.CONV:
                self.taps[layer.index].copy_(layer.paw.mix.weight.permute(1, 2, 0))


@dataclass(slots=True)
class ChunkBuffers:
    """As ChunkState and ReaderChunks hold them; before_B to kept_B say what the current token does.

    rings: by chunk layer, keys and values [B, C, W] and the open chunk's sum [B, d].
    """

    closed_B: Tensor
    open_size_B: Tensor
    continuable_B: Tensor
    before_B: Tensor
    slot_B: Tensor
    size_B: Tensor
    kept_B: Tensor
    closed_TB: Tensor
    opens_TB: Tensor
    score_BHC: Tensor
    mixed_BW: Tensor
    summary_BW: Tensor
    bucket_C: Tensor
    rings: dict[int, tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def empty(cls, room: Room, config: FBSConfig) -> ChunkBuffers:
        rows, width, ring = room.rows, config.chunk_width, config.chunk_cache
        distance_C = torch.arange(ring, device=room.device)
        bucket_C = distance_bucket(distance_C, config.chunk_distance_buckets, ring)
        return cls(
            *(room.integers(rows) for _ in range(7)),
            closed_TB=room.integers(room.steps, rows),
            opens_TB=room.bytes(room.steps, rows),
            score_BHC=room.floats(rows, config.chunk_heads, 1 + ring),
            mixed_BW=room.numbers(rows, width),
            summary_BW=room.numbers(rows, width),
            bucket_C=bucket_C.int(),
            rings={
                layer: (
                    room.numbers(rows, ring, width),
                    room.numbers(rows, ring, width),
                    room.floats(rows, config.hidden_size),
                )
                for layer in config.reader_layers
            },
        )
