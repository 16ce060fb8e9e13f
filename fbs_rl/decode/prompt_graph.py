"""The pass over whole prompts of one length as a CUDA graph: the host takes longer to start each of its thousands of
small kernels than the GPU takes to run it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PromptGraph:
    """read: what is captured, from prompts [B, T] to the logits of their last tokens [B, V]; it may not look at the
    device. Whatever else it leaves lies where it lay when it was captured. reads: what it finds beside weights, which
    must stay where it is as long as the graph does."""

    def __init__(
        self,
        read: Callable[[Tensor], Tensor],
        prompt_BT: Tensor,
        reads: Callable[[], object] = lambda: None,
    ) -> None:
        self._prompt_BT = prompt_BT
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            read(prompt_BT)  # compiles, derives and reserves what a capture must not
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = read(prompt_BT)
        self._reads = reads()

    def __call__(self, prompt_BT: Tensor) -> Tensor:
        """The logits, overwritten by the next call."""
        self._prompt_BT.copy_(prompt_BT)
        self._graph.replay()
        return self._logits_BV
