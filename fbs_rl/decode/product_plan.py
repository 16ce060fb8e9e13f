"""How a product is cut into blocks, units and chunks, so that every multiprocessor reads about the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fbs_rl.decode.kernel_arguments import Kind
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.program import WARPS

_CHUNK_BYTES = 5120  # that a warp asks for at once, of all its rows together, at most
_TENSOR_COLUMNS = (
    2560  # of a piece at most, with tensor cores: short copies cost more than their bytes
)
_PIECE_COLUMNS = 256  # that a warp could read in the time that a piece takes beside its bytes
_INPUT_BYTES = 72 * 1024  # of all rows' inputs, at a time, where they may come in parts


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """blocks, at most one a multiprocessor. parts: of the columns, whose inputs a block has one at a time; splits: of
    a part's length, that different warps take, if each has its own weights.

    chunk: columns that come at once, of each of a few rows; unit_chunks: of a split. room_bytes: of inputs and sums,
    without a norm.
    """

    blocks: int
    parts: int
    splits: int
    chunk: int
    unit_chunks: int
    room_bytes: int

    @classmethod
    def of(
        cls, rows: int, columns: int, shape: KernelShape, multiprocessors: int, kind: Kind
    ) -> ProductPlan:
        """The plan for `rows` outputs of `columns` inputs. Raises ValueError for sizes that the kernel cannot take."""
        if columns % shape.lane_numbers:
            raise ValueError(
                f"a product over {columns} inputs does not fit the graph decoder, which needs multiples of "
                f"{shape.lane_numbers}; decode with fbs_rl.decoding"
            )
        blocks = min(-(-rows // shape.share_rows), multiprocessors)
        sides = 2 if kind.writes == "GATED" else 1
        step = max(sides, shape.share_rows)
        shares = -(-rows // step)
        each = -(-shares // blocks) * step
        groups = -(-each // sides // shape.out_rows) * sides
        if shape.tensor_cores:
            return cls._of_tensor_cores(blocks, groups, columns, shape, kind)
        chunk, splits = min(_cuts(columns, shape), key=lambda cut: _burden(groups, columns, *cut))
        sums = groups * splits * shape.out_rows * shape.rows * 4
        room = shape.rows * shape.row_bytes(columns) + sums
        return cls(blocks, 1, splits, chunk, columns // chunk // splits, room)

    @classmethod
    def _of_tensor_cores(
        cls, blocks: int, groups: int, columns: int, shape: KernelShape, kind: Kind
    ) -> ProductPlan:
        """All warps share each piece and keep a sum of their own."""
        parts = _parts(columns, shape) if kind.reads == "PLAIN" else 1
        width = columns // parts
        chunk = next(
            width // count
            for count in range(1, width + 1)
            if not width % (count * shape.lane_numbers) and width // count <= _TENSOR_COLUMNS
        )
        kept_rows = 1024 // shape.rows // 16 * 16  # KEPT_ROWS of kernels/products.cu
        kept = min(groups, kept_rows // shape.out_rows) if parts == 1 else groups
        sums = kept * WARPS * shape.out_rows * shape.rows * 4
        room = shape.rows * shape.row_bytes(width) + sums
        return cls(blocks, parts, 1, chunk, width // chunk, room)

    def weights(self) -> dict[str, int]:
        """What Weights of kernels/weights.cu is told of it."""
        return {
            "blocks": self.blocks,
            "parts": self.parts,
            "splits": self.splits,
            "chunk": self.chunk,
            "unit_chunks": self.unit_chunks,
        }


def _parts(columns: int, shape: KernelShape) -> int:
    """The fewest whose inputs leave room for weights; 1 where nothing else divides the columns."""
    for parts in range(1, columns // shape.lane_numbers + 1):
        fits = shape.rows * shape.row_bytes(columns // parts) <= _INPUT_BYTES
        if fits and not columns % (parts * shape.lane_numbers):
            return parts
    return 1


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


def _burden(groups: int, columns: int, chunk: int, splits: int) -> float:
    """Columns that the busiest warp reads, and what its pieces cost it beside; a split costs sums and room, so it must
    bring more than a percent."""
    units = -(-groups * splits // WARPS)
    pieces = columns // chunk // splits
    return units * (columns / splits + _PIECE_COLUMNS * pieces) * (1 + 0.015 * splits)
