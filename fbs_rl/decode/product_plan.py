"""How a product is cut into blocks, units and chunks, so that every multiprocessor reads about the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fbs_rl.decode.cuda_launcher import MOST_SHARED_BYTES
from fbs_rl.decode.kernel_source import KernelShape

WARPS = 8  # PRODUCT_WARPS of kernels/products.cu
_MOST_SLOTS = 8
_CHUNK_BYTES = 1536  # of one row, at most
_RING_BYTES = 80 * 1024  # of a block: two blocks, of a kernel and the next, share a multiprocessor
_OWN_BYTES = 4 * 1024  # what kernels declare for themselves


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """blocks, one a multiprocessor; splits: parts of a row's length that different warps take.

    chunk: columns that a warp asks for at once, of each of its rows; unit_chunks: of a part; slots: chunks that
    it is ahead.
    """

    blocks: int
    splits: int
    chunk: int
    unit_chunks: int
    slots: int
    shared_bytes: int

    @classmethod
    def of(cls, rows: int, columns: int, shape: KernelShape, multiprocessors: int) -> ProductPlan:
        """The plan for `rows` outputs of `columns` inputs. Raises ValueError for sizes that the kernel cannot take."""
        if columns % shape.lane_numbers:
            raise ValueError(
                f"a product over {columns} inputs does not fit the graph decoder, which needs multiples of "
                f"{shape.lane_numbers}; decode with fbs_rl.decoding"
            )
        groups = -(-rows // shape.out_rows)
        blocks = min(groups, multiprocessors)
        each = -(-groups // blocks)
        chunk, splits = min(_cuts(columns, shape), key=lambda cut: _burden(each, columns, *cut))
        number = 16 // shape.lane_numbers
        inputs = (shape.rows + 1) * columns * number
        sums = each * splits * shape.out_rows * shape.rows * 4
        slot = WARPS * shape.out_rows * chunk * number
        left = MOST_SHARED_BYTES - _OWN_BYTES - inputs - sums
        slots = min(_MOST_SLOTS, max(1, _RING_BYTES // slot), left // slot)
        if slots < 1:
            raise ValueError(
                f"{shape.rows} rows of {columns} inputs do not fit a multiprocessor's {MOST_SHARED_BYTES >> 10} KiB; "
                f"decode fewer rows at once or in bfloat16"
            )
        return cls(
            blocks, splits, chunk, columns // chunk // splits, slots, inputs + sums + slots * slot
        )


def _cuts(columns: int, shape: KernelShape) -> Iterator[tuple[int, int]]:
    """(chunk, splits) that divide the columns; chunks as long as is allowed for each number of splits."""
    number = 16 // shape.lane_numbers
    for splits in range(1, WARPS + 1):
        for parts in range(splits, columns // shape.lane_numbers + 1, splits):
            chunk = columns // parts
            if columns % parts or chunk % shape.lane_numbers or chunk * number > _CHUNK_BYTES:
                continue
            yield chunk, splits
            break


def _burden(each: int, columns: int, chunk: int, splits: int) -> float:
    """Columns that the busiest warp reads; a split costs sums and room, so it must bring more than a percent."""
    units = -(-each * splits // WARPS)
    return units * columns / splits * (1 + 0.015 * splits)
