"""Decoding on the GPU: one captured launch a token, in which a skipped layer's weights are not read.

    decoder = GraphDecoder(model, rows=1, tokens=640, gates="threshold")
    decoder.prefill(prompt_BT)
    decoder.step(127)
    decoder.trace().token_BT

The prompt runs through the model's own forward; then every step is one replay of the same graph, whose
decisions never leave the device. docs/decode.md says how it works.

Letters: B rows, T steps, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from fbs_rl.decode.cuda_launcher import CudaLauncher, Launcher
from fbs_rl.decode.prompt_graph import PromptGraph
from fbs_rl.decode.step_buffers import ChunkBuffers
from fbs_rl.decode.step_program import StepOptions, StepProgram, copy_weights, kernel_shape
from fbs_rl.decode.supported import check_supported
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.types import GateMode, as_row_vector

Sampler = Callable[[Tensor, Tensor], Tensor]
"""The next tokens [B] from logits [B, V] and the positions [B] that they will take, on the device alone."""


class RowsDecide(StrEnum):
    """How the rows of a batch come to skip."""

    ALONE = "alone"  # each row by its own p; a layer is read if any row runs it
    TOGETHER = "together"  # all or none, by the means of p and τ (threshold gates)


@dataclass(frozen=True, slots=True)
class DecodeTrace:
    """What was decoded. Column j of skip_LBT (bool) and prob_LBT is what happened when token j was fed.

    start_B: tokens of each prompt. token_BT: tokens made, one more than were fed. closed_chunks_BT, opens_BT: as
    count_trace reads them; None without a Chunk-Head. gates_on: gates were computed.
    """

    start_B: Tensor
    token_BT: Tensor
    skip_LBT: Tensor
    prob_LBT: Tensor
    closed_chunks_BT: Tensor | None
    opens_BT: Tensor | None
    gates_on: bool

    def texts(self, end_ids: Collection[int] = ()) -> list[list[int]]:
        """Each row's tokens up to the first of end_ids, that included; a row goes on while others have not ended."""
        return [_until_end(row, end_ids) for row in self.token_BT.tolist()]


def _until_end(tokens: list[int], end_ids: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokens[: end + 1]


class GraphDecoder:
    """Decodes `rows` sequences side by side, up to `tokens` each, padding and prompt included.

    gates: dense, threshold or sample. never_skip: more layers that always run. sampler: None takes the best
    token. prompt_lengths: of prompts, without padding, whose pass is captured in advance; prompts of other lengths take
    longer. launcher: where kernels run; None is this process's CUDA device. Raises ValueError, in one sentence,
    for what it does not do (fbs_rl.decode.supported) and where there is no such device.
    """

    def __init__(
        self, model: FBSForCausalLM, rows: int, tokens: int, *, gates: GateMode | str = GateMode.DENSE,
        rows_decide: RowsDecide | str = RowsDecide.ALONE, never_skip: Sequence[int] = (),
        sampler: Sampler | None = None, prompt_lengths: Collection[int] = (), launcher: Launcher | None = None,
    ) -> None:  # fmt: skip
        self.mode, rows_decide = GateMode(gates), RowsDecide(rows_decide)
        check_supported(model, self.mode, tokens)
        for length in prompt_lengths:
            _check_prompt(rows, length, rows, tokens)
        self.model, self.rows, self.tokens, self.sampler = model, rows, tokens, sampler
        self.shape = kernel_shape(model, rows)
        self.launcher = CudaLauncher(self.shape) if launcher is None else launcher
        options = StepOptions(
            tokens, tokens, gates_act=self.mode is not GateMode.DENSE, sampled=self.mode is GateMode.SAMPLE,
            together=rows_decide is RowsDecide.TOGETHER, picks=sampler is None, never_skip=never_skip,
        )  # fmt: skip
        made = StepProgram.of(model, self.shape, self.launcher, options)
        self.writer, self.program, self._to_logits = made.writer, made.program, made.to_logits
        self._prompts: dict[int, PromptGraph] = {}
        device = self.launcher.device
        self.prompt_tokens, self.taken, self._graph = 0, 0, None
        self._start_B = torch.zeros(rows, dtype=torch.long)
        if device.type == "cuda":
            self._capture()
            self._capture_prompts(prompt_lengths)

    def refresh_weights(self) -> None:
        """Follow a change of the model's weights in place; the graph of a step stays as it is, those of prompts, which
        read what the model keeps of its weights, are captured anew."""
        copy_weights(self.writer)
        self._capture_prompts(self._prompts)

    def _capture_prompts(self, lengths: Collection[int]) -> None:
        for length in tuple(lengths):
            prompt_BT = torch.zeros(
                self.rows, length, dtype=torch.long, device=self.launcher.device
            )
            self._prompts[length] = PromptGraph(
                self._read_whole, prompt_BT, self.model.model.derived
            )

    @torch.inference_mode()
    def prefill(
        self, prompt_BT: Tensor, tau: float | Tensor | None = None, gate_seed: int | Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Reads the prompts and returns the first token of every row [B], which step() feeds.

        mask_BT: 0 where a prompt that is shorter than others is padded, in front of it; None: nowhere. tau:
        threshold, one or one a row (None: the model's). gate_seed: of gates="sample", likewise.
        """
        rows, length = prompt_BT.shape
        _check_prompt(rows, length, self.rows, self.tokens)
        if self.mode is GateMode.SAMPLE and gate_seed is None:
            raise ValueError('gates="sample" needs gate_seed, one or one a row')
        device = self.launcher.device
        mask_BT = torch.ones_like(prompt_BT) if mask_BT is None else mask_BT.long()
        _check_padding(mask_BT, prompt_BT)
        self.prompt_tokens, self.taken = length, 0
        self._start_B = mask_BT.sum(1).cpu()
        if not bool(mask_BT.all()):
            logits_BV = self._read_padded(prompt_BT.to(device), mask_BT.to(device))
        elif length in self._prompts:
            logits_BV = self._prompts[length](prompt_BT)
        else:  # without a mask attention is faster
            logits_BV = self._read_whole(prompt_BT.to(device))
        self._begin(tau, gate_seed)
        buffers = self.writer.tokens
        first_B = (
            logits_BV.argmax(-1)
            if self.sampler is None
            else self.sampler(logits_BV, buffers.position_B)
        )
        buffers.token_B.copy_(first_B)
        self._first_B = first_B.clone()
        return first_B

    def force(self, token_BT: Tensor) -> None:
        """Feed these tokens next, whatever the logits say: the first now, the others as steps follow."""
        buffers, count = self.writer.tokens, token_BT.shape[1]
        buffers.token_B.copy_(token_BT[:, 0])
        self._first_B = token_BT[:, 0].clone()
        start = self.taken
        buffers.forced_TB[start : start + count - 1] = token_BT[:, 1:].T
        buffers.forced_steps.fill_(start + count - 1)

    def step(self, count: int = 1) -> None:
        """Feed `count` tokens a row; returns before the device is done."""
        if self.prompt_tokens + self.taken + count > self.tokens or not self.prompt_tokens:
            raise ValueError(
                f"{count} more steps behind {self.prompt_tokens} prompt tokens and {self.taken} steps do not fit "
                f"{self.tokens} tokens; make the decoder with more, and prefill first"
            )
        for _ in range(count):
            self.taken += 1
            if self._graph is None:
                self._run()
            else:
                self._graph.replay()

    def decode(self, count: int, end_ids: Collection[int], look_every: int = 16) -> list[list[int]]:
        """The rows' texts after up to `count` steps, fewer once every row has made one of end_ids.

        Tokens are looked at every look_every steps, which waits for the device.
        """
        for done in range(0, count, look_every):
            self.step(min(look_every, count - done))
            texts = self.trace().texts(end_ids)
            if all(text[-1] in end_ids for text in texts):
                break
        return self.trace().texts(end_ids)

    def trace(self) -> DecodeTrace:
        """What has been decoded since the prompt, on the host; waits for the device."""
        writer, steps = self.writer, slice(0, self.taken)
        made_BT = writer.tokens.token_TB[steps].T.long().cpu()
        chunks = writer.chunks
        closed = None if chunks is None else chunks.closed_TB[steps].T.long().cpu()
        opens = None if chunks is None else chunks.opens_TB[steps].T.bool().cpu()
        return DecodeTrace(
            start_B=self._start_B,
            token_BT=torch.cat((self._first_B.long().cpu().unsqueeze(1), made_BT), 1),
            skip_LBT=writer.gates.skip_TLB[steps].permute(1, 2, 0).bool().cpu(),
            prob_LBT=writer.gates.prob_TLB[steps].permute(1, 2, 0).cpu(),
            closed_chunks_BT=closed,
            opens_BT=opens,
            gates_on=bool(writer.free),
        )

    @property
    def logits_BV(self) -> Tensor:
        """Of the last step, in the model's type; overwritten by the next."""
        return self.writer.tokens.logits_BV

    # --- inside --------------------------------------------------------------------------------------

    def _run(self) -> None:
        """One step: one launch, or two with a sampler's own operations between them."""
        end = len(self.writer.calls)
        if self.sampler is None:
            self.launcher.run(self.program, 0, end)
            return
        tokens = self.writer.tokens
        self.launcher.run(self.program, 0, self._to_logits)
        tokens.token_B.copy_(self.sampler(tokens.logits_BV, tokens.position_B + 1))
        self.launcher.run(self.program, self._to_logits, end)

    @torch.inference_mode()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()  # compiles and reserves what a capture must not
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph

    @torch.inference_mode()
    def _read_whole(self, prompt_BT: Tensor) -> Tensor:
        """The model's own pass over prompts: their last logits [B, V], and all else into the step's buffers."""
        cache, logits_BV = self._read(prompt_BT, None)
        layers, length = self.writer.layers, prompt_BT.shape[1]
        for layer, kv in enumerate(cache.layers):
            keys, values, _ = kv.view()
            layers.keys[layer][:, :, :length] = keys
            layers.values[layer][:, :, :length] = values
        return logits_BV

    def _read_padded(self, prompt_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The same of prompts of unequal lengths, without what pads them."""
        cache, logits_BV = self._read(prompt_BT, mask_BT)
        layers, length = self.writer.layers, prompt_BT.shape[1]
        for layer, kv in enumerate(cache.layers):
            keys, values, _ = kv.view()
            for row, start in enumerate(self._start_B.tolist()):
                layers.keys[layer][row, :, :start] = keys[row, :, length - start :]
                layers.values[layer][row, :, :start] = values[row, :, length - start :]
        return logits_BV

    def _read(self, prompt_BT: Tensor, mask_BT: Tensor | None) -> tuple[FBSCache, Tensor]:
        cache = FBSCache(self.model.config.layer_count)
        out = self.model(
            prompt_BT, mask_BT, past_key_values=cache, gates=GateMode.DENSE, logits_to_keep=1
        )
        if self.writer.chunks is not None:
            _copy_chunks(cache, self.writer.chunks)
        return cache, out.logits[:, -1]

    def _begin(self, tau: Any, gate_seed: Any) -> None:
        """The rest of what steps behind the prompt begin with."""
        writer, device = self.writer, self.launcher.device
        start_B, entries = self._start_B.to(device, torch.int32), writer.layers.length_LBG
        if entries is not None:
            entries.copy_(start_B.view(1, -1, 1).expand_as(entries))
        writer.tokens.position_B.copy_(start_B)
        for counter in (writer.tokens.step, writer.tokens.forced_steps):
            counter.zero_()
        gates = writer.gates
        tau = self.model.config.tau if tau is None else tau
        gates.tau_B.copy_(as_row_vector(tau, self.rows, torch.float32, device))
        if gate_seed is not None:
            seed_B = as_row_vector(gate_seed, self.rows, torch.int64, device)
            gates.seed_B2.copy_(seed_B.view(torch.int32).view(-1, 2))  # low word first
        for tensor in (gates.skip_LB, gates.guess_LB, gates.prob_TLB, gates.skip_TLB):
            tensor.zero_()
        for tensor in (gates.stay_LB, gates.doubt_LB):
            tensor.fill_(1)


def _check_prompt(rows: int, length: int, most_rows: int, tokens: int) -> None:
    if rows != most_rows or not 0 < length < tokens:
        raise ValueError(
            f"the prompts are {rows} rows of {length} tokens; this decoder takes {most_rows} rows of 1 to {tokens - 1}"
        )


def _check_padding(mask_BT: Tensor, prompt_BT: Tensor) -> None:
    rows, length = prompt_BT.shape
    rises = mask_BT.shape == prompt_BT.shape and bool((mask_BT.diff(dim=1) >= 0).all())
    if not rises or not bool(mask_BT[:, -1].all()):
        raise ValueError(
            f"the mask must be {rows} rows of {length} that begin with zeros and end with ones; "
            f"pad shorter prompts in front"
        )


def _copy_chunks(cache: FBSCache, chunks: ChunkBuffers) -> None:
    state = cache.chunks
    assert state is not None
    chunks.closed_B.copy_(state.closed_B)
    chunks.open_size_B.copy_(state.open_size_B)
    chunks.continuable_B.copy_(state.continuable_B)
    for layer, (keys, values, sum_Bd) in chunks.rings.items():
        reader = state.readers[layer]
        keys.copy_(reader.key_BCW)
        values.copy_(reader.value_BCW)
        sum_Bd.copy_(reader.open_sum_Bd)
