"""PAW, the Preview-Attention Window: how far a token looks ahead and what it expects there (SPEC 2).

One PreviewHead is shared by the model (projections, preview vocabulary, shortlist); each PAW layer has
its own Paw (window predictor, per-layer scale and bias, compression, injection). Everything is a
function of the one token's state, so sequences and single decoding steps run the same code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbs_rl.model.compiled import compilable, compiling
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.kept import Kept
from fbs_rl.types import Compression

_CONV_GROUP = 16
_SHORTLIST_TOKENS = (
    4096  # the [tokens, preview vocabulary] score matrix is made this many tokens at a time
)
_SHORTLIST_GROUP = 32
_DENSE_MIX_WIDTH = 256


@dataclass(slots=True, frozen=True)
class Derived:
    """What the head's parameters and the backbone's embedding determine: E_r twice and the mean map.

    A product of one token with a matrix on a CPU reads it two to four times as fast column by column;
    gathering candidates wants rows.
    """

    reduced_NR: Tensor
    reduced_RN: Tensor  # without gradient: it only ranks
    mean_map_RR: Tensor


@dataclass(slots=True)
class Shortlist:
    """Candidates of one step, shared by all horizons and all PAW layers.

    index_BTM: positions in the preview vocabulary. reduced_BTMR: their rank-R embeddings.
    expectation_BTME: the embeddings that the expectation runs over (the same, or true rows).
    """

    index_BTM: Tensor
    reduced_BTMR: Tensor
    expectation_BTME: Tensor


@dataclass(slots=True)
class Glance:
    """What one PAW layer saw: the input of the injection and of the gates up to the next PAW layer.

    pooled_BTE: ṽ. entropy_BT: H₁ in nats, of the first horizon over the shortlist. window_BT: ŵ in
    tokens. inclusion_BTK: α. query_BTR: scored against the vocabulary by the losses. shortlist: what it
    was drawn from, the same for the next PAW layer.
    """

    pooled_BTE: Tensor
    entropy_BT: Tensor
    window_BT: Tensor
    inclusion_BTK: Tensor
    query_BTR: Tensor
    shortlist: Shortlist


class PreviewHead(nn.Module):
    """Rank-R multi-horizon head over the preview vocabulary (SPEC 2.3), shared by all PAW layers.

    ℓ_{t,h}(v) = E_r[v]·(A_h B x̂_t) with E_r = E·P; row `unk_R` stands for every token outside the
    preview vocabulary and is a class of the loss only, never a candidate.
    """

    def __init__(self, config: FBSConfig) -> None:
        super().__init__()
        self.horizons, self.rank = config.paw_horizon, config.paw_rank
        self.shortlist_size = config.paw_shortlist
        self.full_space = config.paw_embed_space == "full"
        self.state_proj = nn.Linear(config.hidden_size, self.rank, bias=False)  # B
        self.embed_proj = nn.Linear(config.hidden_size, self.rank, bias=False)  # P
        self.horizon_maps = nn.Parameter(torch.empty(self.horizons, self.rank, self.rank))  # A_h
        self.unk_R = nn.Parameter(torch.empty(self.rank))
        size = config.preview_vocab_size
        self.register_buffer("token_ids_N", torch.empty(size, dtype=torch.int64))
        self.register_buffer("log_prior_N", torch.empty(size))
        self.token_ids_N: Tensor
        self.log_prior_N: Tensor
        self._derived: Kept[Derived] = Kept()
        self._maps: Kept[Tensor] = Kept()

    def reset_parameters(self) -> None:
        for linear in (self.state_proj, self.embed_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        with torch.no_grad():
            nn.init.normal_(self.horizon_maps, std=0.1 * self.rank**-0.5)
            self.horizon_maps += torch.eye(
                self.rank, dtype=self.horizon_maps.dtype, device=self.horizon_maps.device
            )
            self.token_ids_N.copy_(torch.arange(len(self.token_ids_N)))
        nn.init.zeros_(self.unk_R)
        nn.init.zeros_(self.log_prior_N)

    def set_vocabulary(self, counts_V: Tensor) -> None:
        """Make the most frequent tokens of `counts_V` the preview vocabulary, with their log frequency as prior.

        Ties and unseen tokens go by token id (merges of a BPE are learned most frequent first).
        """
        order = torch.argsort(counts_V.double(), descending=True, stable=True)
        kept = order[: len(self.token_ids_N)].sort().values
        frequency = (counts_V[kept].double() + 0.5) / (
            counts_V.sum().double() + 0.5 * len(counts_V)
        )
        self.token_ids_N.copy_(kept)
        self.log_prior_N.copy_(frequency.log())

    def reduced_embedding(self, embedding_Vd: Tensor) -> Tensor:
        """E_r [N, R]; recomputed with gradients when P trains, kept between calls otherwise."""
        return self.derive(embedding_Vd).reduced_NR

    def forget_derived(self) -> None:
        """Drop what is kept. Needed after writes through `.data`, which leave no trace on a tensor."""
        self._derived.forget()
        self._maps.forget()

    def derived(self) -> tuple[object, ...]:
        """What is kept, so that somebody can keep it longer."""
        return self._derived.held, self._maps.held

    def derive(self, embedding_Vd: Tensor) -> Derived:
        """E_r and what else follows from the weights, kept between calls."""

        def make() -> Derived:
            # E is detached: the preview losses must not move the backbone's embedding (SPEC 6.4).
            reduced = self.embed_proj(embedding_Vd.detach()[self.token_ids_N])
            mean_map = self.horizon_maps.detach().mean(0)
            return Derived(reduced, reduced.detach().t().contiguous(), mean_map)

        return self._derived.get(
            make, self.embed_proj.weight, embedding_Vd, self.horizon_maps, self.token_ids_N
        )

    def _maps_side_by_side(self) -> Tensor:
        """Every A_h, for q from the left: [R, K·R]. Column by column, as in Derived."""
        return self.horizon_maps.flatten(0, 1).t().contiguous()

    def horizon_queries(self, query_BTR: Tensor) -> Tensor:
        """A_h q for every horizon: [B, T, K, R]."""
        maps = self._maps.get(self._maps_side_by_side, self.horizon_maps)
        return (query_BTR @ maps).unflatten(-1, (self.horizons, self.rank))

    def shortlist(self, query_BTR: Tensor, embedding_Vd: Tensor) -> Shortlist:
        """The M candidates with the highest mean-horizon score plus log-frequency prior."""
        derived = self.derive(embedding_Vd)
        tokens = F.linear(query_BTR.detach(), derived.mean_map_RR).flatten(0, 1)
        prior_N = self.log_prior_N.float()
        chunks = [
            _best(part @ derived.reduced_RN, prior_N, self.shortlist_size)
            for part in tokens.split(_SHORTLIST_TOKENS)
        ]
        index_BTM = torch.cat(chunks).view(*query_BTR.shape[:2], -1)
        reduced = F.embedding(index_BTM, derived.reduced_NR)
        full = (
            F.embedding(self.token_ids_N[index_BTM], embedding_Vd.detach())
            if self.full_space
            else reduced
        )
        return Shortlist(index_BTM, reduced, full)


def _best(score_XN: Tensor, prior_N: Tensor, count: int) -> Tensor:
    """Indices [X, count] of the highest score + prior.

    In two steps on a GPU, where selecting costs more than the scores: the highest lie in the groups with the
    highest maxima.
    """
    groups = len(prior_N) // _SHORTLIST_GROUP
    if not score_XN.is_cuda or len(prior_N) % _SHORTLIST_GROUP or groups < 4 * count:
        return (score_XN.float() + prior_N).topk(count).indices
    chosen_XG = _group_maxima(score_XN, prior_N).topk(count, sorted=False).indices
    every_S = torch.arange(_SHORTLIST_GROUP, device=score_XN.device)
    index_XC = (chosen_XG.unsqueeze(-1) * _SHORTLIST_GROUP + every_S).flatten(1)
    narrowed_XC = score_XN.gather(1, index_XC).float() + prior_N[index_XC]
    return index_XC.gather(1, narrowed_XC.topk(count).indices)


@compilable
def _group_maxima(score_XN: Tensor, prior_N: Tensor) -> Tensor:
    return (score_XN.float() + prior_N).unflatten(-1, (-1, _SHORTLIST_GROUP)).amax(-1)


class Paw(nn.Module):
    """The Preview-Attention Window of one layer: h̃ = h + s·W_up·RMSNorm(ṽ), with s = 0 at the start."""

    def __init__(self, config: FBSConfig) -> None:
        super().__init__()
        self.horizons = config.paw_horizon
        self.fixed_window = config.paw_fixed_window if config.paw_window == "fixed" else None
        self.hard = config.paw_inclusion == "hard"
        self.window_mean_frac = config.paw_window_mean_frac
        self.compression = Compression(config.paw_compression)
        width = config.preview_width
        if self.fixed_window is None:
            self.window_in = nn.Linear(
                config.hidden_size, config.paw_window_hidden, bias=False
            )  # W_w
            self.window_out = nn.Linear(config.paw_window_hidden, 1)  # u, b_w
        self.query_scale_R = nn.Parameter(torch.empty(config.paw_rank))
        self.query_bias_R = nn.Parameter(torch.empty(config.paw_rank))
        if self.compression is Compression.CONV:
            self.mix = nn.Conv1d(
                width, width, kernel_size=3, padding=1, groups=width // _CONV_GROUP
            )
            self._taps: Kept[Tensor] = Kept()
        elif self.compression is Compression.LINEAR:
            self.mix = nn.Linear(width * self.horizons, width, bias=False)
        self.up_norm = nn.RMSNorm(config.pooled_width, eps=config.rms_norm_eps)
        self.up = nn.Linear(config.pooled_width, config.hidden_size, bias=False)
        self.strength = nn.Parameter(torch.empty(1))  # s

    def reset_parameters(self) -> None:
        if self.fixed_window is None:
            nn.init.normal_(self.window_in.weight, std=self.window_in.in_features**-0.5)
            nn.init.normal_(self.window_out.weight, std=0.1 * self.window_out.in_features**-0.5)
            nn.init.constant_(
                self.window_out.bias, math.log(self.window_mean_frac / (1 - self.window_mean_frac))
            )
        nn.init.ones_(self.query_scale_R)
        nn.init.zeros_(self.query_bias_R)
        if self.compression in (Compression.CONV, Compression.LINEAR):
            self.mix.reset_parameters()
        nn.init.ones_(self.up_norm.weight)
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5)
        nn.init.zeros_(self.strength)

    def forget_derived(self) -> None:
        """As PreviewHead.forget_derived."""
        if self.compression is Compression.CONV:
            self._taps.forget()

    def derived(self) -> tuple[object, ...]:
        """As PreviewHead.derived."""
        return (self._taps.held,) if self.compression is Compression.CONV else ()

    def query(self, normed_BTd: Tensor, head: PreviewHead) -> Tensor:
        """The token's query q [B, T, R], before the per-horizon maps."""
        return torch.addcmul(self.query_bias_R, head.state_proj(normed_BTd), self.query_scale_R)

    def forward(
        self,
        normed_BTd: Tensor,
        query_BTR: Tensor,
        head: PreviewHead,
        shortlist: Shortlist,
        temperature: float | Tensor,
    ) -> Glance:
        """Look ahead from normed_BTd = x̂, with the step's shortlist."""
        taps = None
        if self.compression is Compression.CONV:
            taps = self._taps.get(self._group_taps, self.mix.weight)
        edges = _horizon_edges(self.horizons, normed_BTd.device)
        pooled_BTE, entropy_BT, window_BT, inclusion_BTK = _look(
            self, normed_BTd, head.horizon_queries(query_BTR), shortlist, temperature, edges, taps
        )
        return Glance(pooled_BTE, entropy_BT, window_BT, inclusion_BTK, query_BTR, shortlist)

    def predict_window(self, normed_BTd: Tensor) -> Tensor:
        """ŵ = K·σ(u·SiLU(W_w x̂) + b_w) in tokens, float32 (SPEC 2.1); constant in the fixed variant."""
        if self.fixed_window is not None:
            return torch.full(
                normed_BTd.shape[:2], float(self.fixed_window), device=normed_BTd.device
            )
        logit = self.window_out(F.silu(self.window_in(normed_BTd))).squeeze(-1)
        return self.horizons * torch.sigmoid(logit.float())

    def include(
        self, window_BT: Tensor, temperature: float | Tensor, edges_K: Tensor | None = None
    ) -> Tensor:
        """α [B, T, K] (SPEC 2.2). Hard: {h : h < ŵ + ½} = {h : soft α > ½}, and always h = 1."""
        if edges_K is None:
            edges_K = _horizon_edges(self.horizons, window_BT.device)
        margin_BTK = window_BT.unsqueeze(-1) - edges_K
        if self.fixed_window is not None:
            return (margin_BTK > 0).float()
        soft = torch.sigmoid(margin_BTK / temperature)
        if not self.hard:
            return soft
        hard = (margin_BTK > 0).float()
        hard[..., 0] = 1.0
        return hard + (soft - soft.detach()) if soft.requires_grad else hard

    def compress(
        self, expected_BTKE: Tensor, inclusion_BTK: Tensor, taps_GIO: Tensor | None = None
    ) -> Tensor:
        """ṽ from the K expected embeddings (SPEC 2.5). taps_GIO: the convolution's weights by group."""
        weighted = expected_BTKE * inclusion_BTK.unsqueeze(-1)
        if self.compression is Compression.NONE:
            return weighted.flatten(-2)
        if self.compression is Compression.LINEAR:
            return self.mix(weighted.flatten(-2))
        if self.compression is Compression.CONV:
            weighted = F.silu(self._convolve(weighted, taps_GIO)) * inclusion_BTK.unsqueeze(-1)
        return weighted.sum(-2) / (inclusion_BTK.sum(-1, keepdim=True) + 1e-6)

    def _convolve(self, values_BTKE: Tensor, taps_GIO: Tensor | None) -> Tensor:
        """The grouped convolution over horizons, as one batched product.

        The library's convolution costs ten times this on the few numbers of a decoding step (CPU).
        """
        if compiling() and values_BTKE.shape[-1] <= _DENSE_MIX_WIDTH:
            return self._convolve_densely(values_BTKE)
        groups = values_BTKE.shape[-1] // _CONV_GROUP
        padded = F.pad(values_BTKE, (0, 0, 1, 1)).unflatten(-1, (groups, _CONV_GROUP))
        windows = torch.cat([padded[..., i : i + self.horizons, :, :] for i in range(3)], dim=-1)
        taps_GIO = self._group_taps() if taps_GIO is None else taps_GIO
        tokens_GNI = windows.flatten(0, 2).transpose(0, 1)
        assert self.mix.bias is not None
        mixed_GNO = torch.baddbmm(self.mix.bias.view(groups, 1, -1), tokens_GNI, taps_GIO)
        return mixed_GNO.transpose(0, 1).flatten(-2).view_as(values_BTKE)

    def _convolve_densely(self, values_BTKE: Tensor) -> Tensor:
        """As _convolve: one product for all groups and taps, then three shifted summands that fuse with what follows.

        Zeros between the groups cost a GPU less than cutting values into groups does.
        """
        groups = values_BTKE.shape[-1] // _CONV_GROUP
        weight_GOIH = self.mix.weight.unflatten(0, (groups, _CONV_GROUP))
        apart_GG = torch.eye(groups, dtype=weight_GOIH.dtype, device=weight_GOIH.device)
        dense = torch.einsum("gf,goih->gihfo", apart_GG, weight_GOIH).flatten(0, 1).flatten(1)
        before, here, after = (values_BTKE @ dense).float().chunk(3, dim=-1)
        assert self.mix.bias is not None
        mixed = here + F.pad(before[..., :-1, :], (0, 0, 1, 0))
        mixed = mixed + F.pad(after[..., 1:, :], (0, 0, 0, 1)) + self.mix.bias.float()
        return mixed.to(values_BTKE.dtype)

    def _group_taps(self) -> Tensor:
        """The convolution's weights per group, inputs by (tap, channel): [G, 48, 16]."""
        groups_GOIH = self.mix.weight.unflatten(0, (-1, _CONV_GROUP))
        return groups_GOIH.permute(0, 3, 2, 1).flatten(1, 2)

    def inject(self, state_BTd: Tensor, pooled_BTE: Tensor) -> Tensor:
        """h̃ = h + s·W_up·RMSNorm(ṽ) (SPEC 2.5, 2.6)."""
        return torch.addcmul(state_BTd, self.up(self.up_norm(pooled_BTE)), self.strength)


@compilable
def _look(
    paw: Paw,
    normed_BTd: Tensor,
    queries_BTKR: Tensor,
    shortlist: Shortlist,
    temperature: float | Tensor,
    edges_K: Tensor,
    taps_GIO: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ṽ, H₁, ŵ, α) of a PAW layer, from everything that is worked out once for several calls."""
    window_BT = paw.predict_window(normed_BTd)
    inclusion_BTK = paw.include(window_BT, temperature, edges_K)
    scores_BTKM = queries_BTKR @ shortlist.reduced_BTMR.transpose(-1, -2)
    prob_BTKM = scores_BTKM.softmax(-1, dtype=torch.float32)
    entropy_BT = torch.special.entr(prob_BTKM[..., 0, :].detach()).sum(-1)
    expected_BTKE = prob_BTKM.to(scores_BTKM.dtype) @ shortlist.expectation_BTME
    pooled_BTE = paw.compress(expected_BTKE, inclusion_BTK.to(expected_BTKE.dtype), taps_GIO)
    return pooled_BTE, entropy_BT, window_BT, inclusion_BTK


@lru_cache(maxsize=8)
def _horizon_edges(horizons: int, device: torch.device) -> Tensor:
    """h − ½ for h = 1..K."""
    with torch.inference_mode(False):  # passes with gradients use it too
        return torch.arange(1, horizons + 1, device=device, dtype=torch.float32) - 0.5
