"""Where a token stands in its paragraph and sentence, as an addition to its embedding.

After Segatron (Bai et al. 2021): a position is (paragraph in the document, sentence in the paragraph,
token in the sentence). The three tables start at zero, so the backbone is unchanged at first. Paragraphs
and sentences end at tokens of a given kind, so the position of a token depends on the tokens before it
only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from fbs_rl.model.configuration import FBSConfig

SENTENCE_END, PARAGRAPH_END = 1, 2
_SENTENCE_MARKS = (".", "!", "?", "。", "！", "？", "…", "；")


class SegmentPosition(nn.Module):
    """Learned embeddings of the three indices, each clamped to its table."""

    def __init__(self, config: FBSConfig) -> None:
        super().__init__()
        self.sizes = (
            config.segment_max_paragraphs,
            config.segment_max_sentences,
            config.segment_max_tokens,
        )
        self.tables = nn.ModuleList(nn.Embedding(size, config.hidden_size) for size in self.sizes)
        self.register_buffer("kind_V", torch.zeros(config.vocab_size, dtype=torch.uint8))
        self.kind_V: Tensor

    def reset_parameters(self) -> None:
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.zeros_(table.weight)
        nn.init.zeros_(self.kind_V)

    def forward(self, index_BT3: Tensor) -> Tensor:
        """The addition to the embeddings, [B, T, d]."""
        parts = [
            table(index_BT3[..., axis].clamp_max(size - 1))
            for axis, (table, size) in enumerate(zip(self.tables, self.sizes, strict=True))
        ]
        return parts[0] + parts[1] + parts[2]

    def walk(
        self,
        ids_BT: Tensor,
        state_B3: Tensor | None = None,
        valid_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Indices [B, T, 3] of the tokens and the state [B, 3] for the token after them.

        A loop over tokens of three integer operations: exact, the same for one step and for many.
        """
        kind_BT = self.kind_V[ids_BT]
        state = (
            torch.zeros(len(ids_BT), 3, dtype=torch.long, device=ids_BT.device)
            if state_B3 is None
            else state_B3
        )
        starts_BT = (
            None if document_BT is None else document_BT != F.pad(document_BT, (1, -1), value=-1)
        )
        indices = []
        for t in range(ids_BT.shape[1]):
            if starts_BT is not None:
                state = torch.where(starts_BT[:, t, None], torch.zeros_like(state), state)
            indices.append(state)
            following = _advance(state, kind_BT[:, t])
            state = (
                following
                if valid_BT is None
                else torch.where(valid_BT[:, t, None], following, state)
            )
        return torch.stack(indices, dim=1), state


def _advance(state_B3: Tensor, kind_B: Tensor) -> Tensor:
    paragraph, sentence, token = state_B3.unbind(-1)
    ends_paragraph, ends_sentence = kind_B == PARAGRAPH_END, kind_B == SENTENCE_END
    ends = ends_paragraph | ends_sentence
    return torch.stack(
        (
            paragraph + ends_paragraph,
            torch.where(ends_paragraph, 0, sentence + ends_sentence),
            torch.where(ends, 0, token + 1),
        ),
        dim=-1,
    )


def token_kinds(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """uint8 [V]: which tokens end a sentence (their text ends in a sentence mark) or a paragraph (a line break)."""
    kinds = torch.zeros(vocab_size, dtype=torch.uint8)
    for token_id in range(min(len(tokenizer), vocab_size)):
        text = str(tokenizer.decode([token_id]))
        if "\n" in text:
            kinds[token_id] = PARAGRAPH_END
        elif text.rstrip().endswith(_SENTENCE_MARKS):
            kinds[token_id] = SENTENCE_END
    return kinds
