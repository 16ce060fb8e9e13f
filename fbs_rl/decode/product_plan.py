"""How a product is cut into blocks, units and chunks, so that every multiprocessor reads about the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.program import WARPS

_CHUNK_BYTES = 5120  # that a warp asks for at once, of all its rows together, at most
_PIECE_COLUMNS = 256  # that a warp could read in the time that a piece takes beside its bytes


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """blocks, at most one a multiprocessor; splits: parts of a row's length that different warps take.

    chunk: columns that a warp asks for at once, of each of its rows; unit_chunks: of a part. room_bytes: of inputs
    and sums, without a norm.
    """

    blocks: int
    splits: int
    chunk: int
    unit_chunks: int
    room_bytes: int

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
        inputs = shape.rows * columns * (16 // shape.lane_numbers)
        sums = (each + 1) * splits * shape.out_rows * shape.rows * 4  # pairs stay together
        return cls(blocks, splits, chunk, columns // chunk // splits, inputs + sums)


def _cuts(columns: int, shape: KernelShape) -> Iterator[tuple[int, int]]:
    """(chunk, splits) that divide the columns; chunks as long as is allowed for each number of splits."""
    most = _CHUNK_BYTES // shape.out_rows // (16 // shape.lane_numbers)
    for splits in range(1, WARPS + 1):
        for parts in range(splits, columns // shape.lane_numbers + 1, splits):
            chunk = columns // parts
            if columns % parts or chunk % shape.lane_numbers or chunk > most:
                continue
            yield chunk, splits
            break


def _burden(each: int, columns: int, chunk: int, splits: int) -> float:
    """Columns that the busiest warp reads, and what its pieces cost it beside; a split costs sums and room, so it must
    bring more than a percent."""
    units = -(-each * splits // WARPS)
    pieces = columns // chunk // splits
    return units * (columns / splits + _PIECE_COLUMNS * pieces) * (1 + 0.015 * splits)
