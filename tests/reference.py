"""The FBS forward a second time, by brute force, as an oracle for the tests.

One sequence, token by token, layer by layer, in float64 numpy, with keys, values and chunks in Python
lists. Written from SPEC.md and the docstrings of fbs_rl; it calls nothing of fbs_rl and reads weights by
their names in the state dict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.reference_math import (
    Array,
    bucket,
    convolve,
    rms,
    rotate,
    sigmoid,
    silu,
    softmax,
    uniform,
)

B, I, O, S = range(4)  # noqa: E741
_POOL_EPS = 1e-6


@dataclass
class Gates:
    """How a sequence is gated. actions: z by [layer][token], for mode "replay".

    noop_keys: what a skipped token leaves under `noop`: nothing, or, for tests that must see a
    difference, the entry of the slot before it ("stale") or its own ("kept").
    """

    mode: str = "dense"
    tau: float = 0.5
    seed: int = 0
    start: int = 0
    actions: Any = None
    never_skip: tuple[int, ...] = ()
    temperature: float | None = None
    noop_keys: str = "none"
    visible_after: int = 1


@dataclass
class Reading:
    """What a sequence gave, token by token: lists over tokens of arrays."""

    logits: list[Array] = field(default_factory=list)
    prob: list[list[float]] = field(default_factory=list)
    skip: list[list[bool]] = field(default_factory=list)
    lookahead: list[list[float]] = field(default_factory=list)
    boundary: list[Array] = field(default_factory=list)
    chunks: list[list[int]] = field(default_factory=list)


def read(weights: dict[str, Array], config: Any, ids: list[int], gates: Gates) -> Reading:
    """Read a whole sequence."""
    reader = _Reader(weights, config, gates)
    for token in ids:
        reader.feed(token)
    reader.reading.chunks = [*(c for c, _ in reader.closed), reader.open]
    return reader.reading


class _Reader:
    def __init__(self, weights: dict[str, Array], config: Any, gates: Gates) -> None:
        self.w, self.c, self.gates = weights, config, gates
        self.reading = Reading()
        depth = config.num_hidden_layers
        self.layers = range(depth)
        self.entries: list[list[tuple[Array, Array]]] = [[] for _ in self.layers]
        self.names = [f"model.layers.{i}." for i in self.layers]
        self.preview_layers = self._preview_layers()
        self.boundary_layer = self._boundary_layer()
        self.reader_layers = self._reader_layers()
        self.forced = self._forced()
        self.theta = config.rope_parameters["rope_theta"]
        self.normed: dict[int, list[Array]] = {i: [] for i in self.reader_layers}
        self.closed: list[
            tuple[list[int], int]
        ] = []  # tokens of a chunk, and the token that closed it
        self.open: list[int] = []
        self.open_with_b = False
        self.place = [0, 0, 0]  # paragraph, sentence, token
        if config.paw:
            embedding = weights["model.embed_tokens.weight"]
            self.kept = weights["model.preview.token_ids_N"].astype(int)
            self.reduced = embedding[self.kept] @ weights["model.preview.embed_proj.weight"].T
            full = config.paw_embed_space == "full"
            self.expected_rows = embedding[self.kept] if full else self.reduced

    # --- which layers do what ----------------------------------------------------------------------

    def _preview_layers(self) -> set[int]:
        named = self.c.paw_layers
        if not self.c.paw:
            return set()
        if named == "all":
            return set(self.layers)
        if isinstance(named, str):
            return {i for i in self.layers if i % int(named.split(":")[1]) == 0}
        return {self._layer(i) for i in named}

    def _layer(self, index: int) -> int:
        return index + len(self.layers) if index < 0 else index

    def _boundary_layer(self) -> int | None:
        if not self.c.chunk:
            return None
        named = self.c.chunk_boundary_layer
        return min(2, len(self.layers) // 4) if named is None else self._layer(named)

    def _reader_layers(self) -> set[int]:
        if self.boundary_layer is None:
            return set()
        depth = len(self.layers)
        if self.c.chunk_layers is not None:
            return {self._layer(i) for i in self.c.chunk_layers}
        return {i for i in (depth // 4, depth // 2, 3 * depth // 4) if i > self.boundary_layer}

    def _forced(self) -> set[int]:
        if not self.c.gate:
            return set(self.layers)
        named = {self._layer(i) for i in (*self.c.never_skip, *self.gates.never_skip)}
        if self.c.gate_ahead:
            named |= set(self.layers[: self.c.gate_block])
        return named | ({self.boundary_layer} if self.boundary_layer is not None else set())

    # --- one token -----------------------------------------------------------------------------------

    def feed(self, token: int) -> None:
        """Read one more token through all layers."""
        position = len(self.reading.logits)
        state = self.w["model.embed_tokens.weight"][token] + self._segment(token)
        motion = (0.0, 1.0)
        shortlist: Any = None
        preview: tuple[Array, float] | None = None
        chance: float | None = None
        probs, skips, windows = [], [], []
        for i in self.layers:
            seen = rms(state, self.c.rms_norm_eps)
            injected = state
            if i in self.preview_layers:
                query = self._query(i, seen)
                if shortlist is None:
                    shortlist = self._shortlist(query)
                window, pooled, entropy = self._glance(i, seen, query, shortlist)
                preview = (pooled, entropy)
                windows.append(window)
                injected = injected + self._injection(i, pooled)
            if i == self.boundary_layer:
                self._label(position, seen)
            if i in self.reader_layers:
                injected = injected + self._consult(i, position, seen)
                self.normed[i].append(seen)
            known = chance
            if (i + self.c.gate_ahead) % self.c.gate_block == 0:
                chance = self._chance(i, seen, motion, preview)
            decided = known if self.c.gate_ahead else chance
            skip = self._decide(i, position, decided)
            probs.append(0.0 if decided is None or i in self.forced else decided)
            skips.append(skip)
            if skip:
                self._leave(i, position, state)
                state = self._skip_path(i, state, seen)
            else:
                executed = self._execute(i, position, injected)
                size = np.sqrt(state @ state)
                motion = (
                    float(np.sqrt(((executed - state) ** 2).sum()) / size),
                    float(executed @ state / (size * np.sqrt(executed @ executed))),
                )
                state = executed
        final = self.w["model.norm.weight"] * rms(state, self.c.rms_norm_eps)
        self.reading.logits.append(self.w["lm_head.weight"] @ final)
        self.reading.prob.append(probs)
        self.reading.skip.append(skips)
        self.reading.lookahead.append(windows)

    def _segment(self, token: int) -> Any:
        if not self.c.segment_position:
            return 0.0
        added = 0.0
        for axis, index in enumerate(self.place):
            table = self.w[f"model.segment_position.tables.{axis}.weight"]
            added = added + table[min(index, len(table) - 1)]
        kind = int(self.w["model.segment_position.kind_V"][token])
        paragraph, sentence, inside = self.place
        ordinary = [paragraph, sentence, inside + 1]
        self.place = [ordinary, [paragraph, sentence + 1, 0], [paragraph + 1, 0, 0]][kind]
        return added

    # --- preview ---------------------------------------------------------------------------------------

    def _query(self, i: int, seen: Array) -> Array:
        paw = self.names[i] + "paw."
        query = self.w["model.preview.state_proj.weight"] @ seen
        return query * self.w[paw + "query_scale_R"] + self.w[paw + "query_bias_R"]

    def _shortlist(self, query: Array) -> Array:
        maps = self.w["model.preview.horizon_maps"]
        pooled = sum(maps[h] @ query for h in range(len(maps))) / len(maps)
        score = self.reduced @ pooled + self.w["model.preview.log_prior_N"]
        return np.argsort(-score)[: self.c.paw_shortlist]

    def _glance(
        self, i: int, seen: Array, query: Array, shortlist: Array
    ) -> tuple[float, Array, float]:
        """(ŵ, ṽ, H₁)."""
        window = self._window(i, seen)
        include = self._inclusion(window)
        entropy, rows = 0.0, []
        for h in range(self.c.paw_horizon):
            horizon_query = self.w["model.preview.horizon_maps"][h] @ query
            prob = softmax(np.array([self.reduced[v] @ horizon_query for v in shortlist]))
            if h == 0:
                entropy = float(-(prob * np.log(prob)).sum())
            expected = sum(p * self.expected_rows[v] for p, v in zip(prob, shortlist, strict=True))
            rows.append(include[h] * expected)
        return window, self._compress(i, rows, include), entropy

    def _window(self, i: int, seen: Array) -> float:
        if self.c.paw_window == "fixed":
            return float(self.c.paw_fixed_window)
        paw = self.names[i] + "paw."
        hidden = silu(self.w[paw + "window_in.weight"] @ seen)
        logit = self.w[paw + "window_out.weight"][0] @ hidden + self.w[paw + "window_out.bias"][0]
        return float(self.c.paw_horizon * sigmoid(logit))

    def _inclusion(self, window: float) -> list[float]:
        horizons = range(1, self.c.paw_horizon + 1)
        if self.c.paw_window == "fixed":
            return [float(h <= window) for h in horizons]
        if self.c.paw_inclusion == "hard":
            return [float(h <= max(1, math.floor(window + 0.5))) for h in horizons]
        temperature = self.gates.temperature or self.c.paw_temperature
        return [float(sigmoid((window - h + 0.5) / temperature)) for h in horizons]

    def _compress(self, i: int, rows: list[Array], include: list[float]) -> Array:
        kind, paw = self.c.paw_compression, self.names[i] + "paw."
        if kind == "none":
            return np.concatenate(rows)
        if kind == "linear":
            return self.w[paw + "mix.weight"] @ np.concatenate(rows)
        if kind == "conv":
            mixed = convolve(rows, self.w[paw + "mix.weight"], self.w[paw + "mix.bias"])
            rows = [a * silu(row) for a, row in zip(include, mixed, strict=True)]
        return sum(rows[1:], rows[0]) / (sum(include) + _POOL_EPS)

    def _injection(self, i: int, pooled: Array) -> Array:
        paw = self.names[i] + "paw."
        normed = self.w[paw + "up_norm.weight"] * rms(pooled, self.c.rms_norm_eps)
        return self.w[paw + "strength"] * (self.w[paw + "up.weight"] @ normed)

    # --- chunks ----------------------------------------------------------------------------------------

    def _label(self, position: int, seen: Array) -> None:
        scores = self.w["model.boundary.classify.weight"] @ seen
        scores = (scores + self.w["model.boundary.classify.bias"])[:4]
        self.reading.boundary.append(scores)
        label = int(scores.argmax())
        if label == I and self.open and self.open_with_b:
            self.open.append(position)
            return
        if self.open:
            self.closed.append((self.open, position))
        self.open, self.open_with_b = [position], label == B

    def _consult(self, i: int, position: int, seen: Array) -> Array:
        """s_c·W_o·attention over the newest closed chunks and the null slot."""
        name = self.names[i] + "chunk_reader."
        heads = self.c.chunk_heads
        query = (self.w[name + "query.weight"] @ seen).reshape(heads, -1)
        slots = [(self.w[name + "null_key"], self.w[name + "null_value"], np.zeros(heads))]
        old_enough = position - self.gates.visible_after
        visible = [tokens for tokens, closed_at in self.closed if closed_at <= old_enough]
        for distance, tokens in enumerate(reversed(visible)):
            if distance == self.c.chunk_cache:
                break
            mean = sum(self.normed[i][t] for t in tokens) / len(tokens)
            summary = self.w[name + "summarise.weight"] @ mean
            bias = self.w[name + "distance_bias"][
                :, bucket(distance, self.c.chunk_distance_buckets, self.c.chunk_cache)
            ]
            key, value = self.w[name + "key.weight"], self.w[name + "value.weight"]
            slots.append((key @ summary, value @ summary, bias))
        mixed = []
        for head in range(heads):
            keys = [key.reshape(heads, -1)[head] for key, _, _ in slots]
            values = [value.reshape(heads, -1)[head] for _, value, _ in slots]
            scores = [
                key @ query[head] / math.sqrt(len(key)) + bias[head]
                for key, (_, _, bias) in zip(keys, slots, strict=True)
            ]
            mixed.append(softmax(np.array(scores)) @ np.array(values))
        return self.w[name + "strength"] * (self.w[name + "out.weight"] @ np.concatenate(mixed))

    # --- gate ------------------------------------------------------------------------------------------

    def _chance(
        self, i: int, seen: Array, motion: tuple[float, float], preview: tuple[Array, float] | None
    ) -> float | None:
        start = i + self.c.gate_ahead
        block = set(range(start, min(start + self.c.gate_block, len(self.layers))))
        own = {self._layer(n) for n in self.c.never_skip} | {self.boundary_layer}
        if not self.c.gate or block <= own:
            return None
        name = self.names[i] + "skip_gate."
        parts: list[Any] = []
        if self.c.gate_inputs != "preview":
            reduced = rms(self.w[name + "reduce.weight"] @ seen, self.c.rms_norm_eps)
            parts += [self.w[name + "reduce_norm.weight"] * reduced, list(motion)]
        if self.c.gate_inputs != "residual":
            assert preview is not None
            parts += [self.w[name + "preview.weight"] @ preview[0], [preview[1]]]
        hidden = self.w[name + "hidden.weight"] @ np.concatenate(parts)
        hidden = silu(hidden + self.w[name + "hidden.bias"])
        logit = self.w[name + "out.weight"][0] @ hidden + self.w[name + "out.bias"][0]
        clip = self.c.gate_logit_clip
        return float(sigmoid(min(max(logit, -clip), clip)))

    def _decide(self, i: int, position: int, chance: float | None) -> bool:
        mode = self.gates.mode
        if mode == "dense" or i in self.forced or position < self.gates.start:
            return False
        if mode == "replay":
            return bool(self.gates.actions[i][position])
        if chance is None:
            return False
        if mode == "threshold":
            return chance >= self.gates.tau
        leader = i // self.c.gate_block * self.c.gate_block
        return uniform(self.gates.seed, position, leader) < chance

    def _skip_path(self, i: int, state: Array, seen: Array) -> Array:
        if self.c.skip_path == "identity":
            return state
        down, up = (self.w[self.names[i] + f"skip_path.{n}.weight"] for n in ("down", "up"))
        return state + up @ silu(down @ seen)

    # --- the backbone's layer --------------------------------------------------------------------------

    def _execute(self, i: int, position: int, injected: Array) -> Array:
        name = self.names[i]
        normed = self.w[name + "input_layernorm.weight"] * rms(injected, self.c.rms_norm_eps)
        self.entries[i].append(self._key_value(i, position, normed))
        queries = self._heads(i, "q", normed)
        shared = len(queries) // len(self.entries[i][0][0])
        mixed = []
        for head, query in enumerate(queries):
            turned = rotate(query, position, self.theta)
            keys = np.array([key[head // shared] for key, _ in self.entries[i]])
            values = np.array([value[head // shared] for _, value in self.entries[i]])
            mixed.append(softmax(keys @ turned / math.sqrt(len(turned))) @ values)
        state = injected + self._linear(name + "self_attn.o_proj", np.concatenate(mixed))
        normed = rms(state, self.c.rms_norm_eps)
        normed = self.w[name + "post_attention_layernorm.weight"] * normed
        gated = silu(self._linear(name + "mlp.gate_proj", normed))
        grown = gated * self._linear(name + "mlp.up_proj", normed)
        return state + self._linear(name + "mlp.down_proj", grown)

    def _leave(self, i: int, position: int, state: Array) -> None:
        """What a skipped token leaves behind for later tokens."""
        if self.c.kv_on_skip == "noop" and self.gates.noop_keys == "none":
            return
        if self.c.kv_on_skip == "noop" and self.gates.noop_keys == "stale":
            self.entries[i] += self.entries[i][-1:]
            return
        normed = self.w[self.names[i] + "input_layernorm.weight"] * rms(state, self.c.rms_norm_eps)
        self.entries[i].append(self._key_value(i, position, normed))

    def _key_value(self, i: int, position: int, normed: Array) -> tuple[Array, Array]:
        keys = [rotate(key, position, self.theta) for key in self._heads(i, "k", normed)]
        return np.array(keys), self._heads(i, "v", normed)

    def _heads(self, i: int, kind: str, normed: Array) -> Array:
        flat = self._linear(self.names[i] + f"self_attn.{kind}_proj", normed)
        heads = flat.reshape(-1, self.c.head_dim)
        norm = self.w.get(self.names[i] + f"self_attn.{kind}_norm.weight")
        return heads if norm is None else norm * rms(heads, self.c.rms_norm_eps)

    def _linear(self, name: str, x: Array) -> Array:
        return self.w[name + ".weight"] @ x + self.w.get(name + ".bias", 0.0)
