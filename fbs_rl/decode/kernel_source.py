"""The decoder's CUDA kernels as text, and what they are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "kernels"
_FILES = (
    "common",
    "hardware",
    "block",
    "weights",
    "asking",
    "sums",
    "skip_path",
    "motion",
    "gate",
    "products",
    "attention",
    "preview",
    "pool",
    "chunks",
    "tokens",
    "program",
)
MOST_ROWS = 16


@dataclass(frozen=True, slots=True)
class KernelShape:
    """What is fixed when the kernels are compiled.

    rows: of a batch. bf16: numbers are bfloat16, else float32. query_group: query heads a key head. paged: a row's
    keys and values lie in pages, else behind each other.
    """

    rows: int
    bf16: bool
    head_dim: int
    query_group: int
    paged: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MOST_ROWS:
            raise ValueError(
                f"a batch of {self.rows} rows does not fit; the graph decoder takes 1 to {MOST_ROWS}"
            )

    @property
    def out_rows(self) -> int:
        """Output rows that a warp of a product works on at once: more of them share what an input costs, fewer
        come in longer pieces, of which each takes the copy engine the same time."""
        if self.tensor_cores:
            return 8
        if self.rows == 1:
            return 1
        return 2 if self.rows == 2 or self.rows > 8 else 4

    @property
    def tensor_cores(self) -> bool:
        """Whether they multiply; with a single row, reading is all that takes time."""
        return self.bf16 and self.rows > 1

    @property
    def share_rows(self) -> int:
        """What a block's share of the output rows is a multiple of, as in kernels/weights.cu."""
        return 1 if self.tensor_cores else self.out_rows

    def row_bytes(self, columns: int) -> int:
        """From a row to the next where several lie in shared memory, as in kernels/weights.cu."""
        numbers = columns * 16 // self.lane_numbers
        return (-(-numbers // 64) | 1) * 64 if self.tensor_cores else numbers

    @property
    def lane_numbers(self) -> int:
        """Numbers in 16 bytes."""
        return 8 if self.bf16 else 4

    def definitions(self) -> dict[str, int]:
        """The macros that kernels/common.cu asks for."""
        return {
            "ROWS": self.rows,
            "BF16": int(self.bf16),
            "HEAD_DIM": self.head_dim,
            "QUERY_GROUP": self.query_group,
            "PAGED": int(self.paged),
            "OUT_ROWS": self.out_rows,
        }


def kernel_text() -> str:
    """All kernels, as one translation unit."""
    return "\n".join((_FOLDER / f"{name}.cu").read_text() for name in _FILES)
