"""Text to tokens with chunk labels, one document at a time."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fbs_rl.data.chunk_labels import ChunkLabeller, coverage_frac
from fbs_rl.data.packing import NO_CLAUSE, TokenStream, document_stream
from fbs_rl.data.script_spans import HAN
from fbs_rl.types import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 2**14
"""Longer documents are tokenised in pieces: memory does not grow with a document, and short pieces are faster."""
_CUT_WINDOW = 2**10
# Before the space or Chinese comma between two letters every common tokenizer starts a new word.
_CUT = re.compile(r"(?<=[^\W\d_])[ ，。！？；、](?=[^\W\d_])")


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One document as tokens. coverage: over the whole document, NaN without Chinese."""

    stream: TokenStream
    coverage: float
    chunks: int
    idioms: int


class DocumentEncoder:
    """A tokenizer and a chunk labeller. Text that looks like a special token is encoded as plain text."""

    def __init__(
        self, backend: Any, vocabulary: int, end_token_id: int, labeller: ChunkLabeller
    ) -> None:
        self._backend, self._labeller = backend, labeller
        self.vocabulary, self.end_token_id = vocabulary, end_token_id
        self.definition: str = backend.to_str()
        self.digest = hashlib.sha256(self.definition.encode()).hexdigest()

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, labeller: ChunkLabeller | None = None
    ) -> DocumentEncoder:
        """The encoder for `tokenizer`, which is not changed.

        Raises ValueError for one that cannot tell which characters a token stands for, or that has no
        end-of-text token.
        """
        name = tokenizer.name_or_path or "given"
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {name} is not a fast one and cannot align labels with tokens; "
                f"use a model folder with a tokenizer.json"
            )
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ValueError(
                f"the tokenizer {name} has no end-of-text token, which documents must end with; "
                f"set eos_token in its tokenizer_config.json"
            )
        # A copy: the settings below are this encoder's own.
        backend: Any = copy.deepcopy(getattr(tokenizer, "backend_tokenizer"))  # noqa: B009
        backend.no_truncation()
        backend.no_padding()
        # A web page that quotes "<|endoftext|>" must not end a document or start a turn.
        backend.encode_special_tokens = True
        vocabulary = max(tokenizer.get_vocab().values()) + 1
        return cls(backend, vocabulary, end, labeller or ChunkLabeller())

    def encode(self, text: str) -> EncodedDocument:
        """Tokens, marks and clauses of one document, closed by the end token."""
        ids: list[int] = []
        labels, clauses = [np.zeros(0, np.int8)], [np.zeros(0, np.int32)]
        chunks = idioms = next_clause = 0
        for piece in _pieces(text):
            if HAN.search(piece) is None:
                # Without offsets, which nobody needs here: a third faster.
                fast = self._backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids
                ids += fast
                labels.append(np.full(len(fast), IGNORED_LABEL, np.int8))
                clauses.append(np.full(len(fast), NO_CLAUSE, np.int32))
                continue
            encoding = self._backend.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            made = self._labeller.label(piece, encoding.offsets)
            labels.append(made.labels_T)
            clauses.append(np.where(made.clause_T < 0, NO_CLAUSE, made.clause_T + next_clause))
            next_clause = max(next_clause, int(clauses[-1].max(initial=NO_CLAUSE)) + 1)
            chunks, idioms = chunks + made.chunk_count, idioms + made.idiom_count
        label_N, clause_N = np.concatenate(labels), np.concatenate(clauses)
        return EncodedDocument(
            stream=document_stream(ids, label_N, clause_N, self.end_token_id),
            coverage=coverage_frac(label_N, clause_N) if next_clause else float("nan"),
            chunks=chunks,
            idioms=idioms,
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text without the end token."""
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones shown."""
        return self._backend.decode(ids, skip_special_tokens=False)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE_CHARS, cut where tokens end anyway, if there is such a place."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        window = max(start + 1, end - _CUT_WINDOW)
        for found in _CUT.finditer(text, window, end):
            end = found.start()
        yield text[start:end]
        start = end
    yield text[start:]
