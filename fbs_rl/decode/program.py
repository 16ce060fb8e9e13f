"""A list of calls as one launch: all blocks walk through it together, and weights of later calls come early."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fbs_rl.decode.kernel_arguments import Call, Void, structures
from fbs_rl.decode.kernel_source import KernelShape

WARPS = 8  # of a block that work on its calls, as in kernels/common.cu
THREADS = 32 * (WARPS + 4)  # and ASKERS of kernels/common.cu, which ask for weights
MOST_SHARED_BYTES = 227 * 1024  # of one block on compute capability 9.0
_FRONT_BYTES = 4608  # FRONT_BYTES and ARGUMENT_BYTES of kernels/program.cu
_ARGUMENT_BYTES = 448
_MOST_RING_BYTES = 28 * 1024  # for each warp: weights that wait for their turn
_WINDOW_BYTES = 10 * 1024  # for each warp: weights on their way, behind which small reads wait
_SHARED_WINDOW_BYTES = 96 * 1024  # the same of a ring that all warps share
_NEAR_BYTES = 30 * 1024  # for each warp: weights that wait in the second cache behind a full ring


class _Header(ctypes.Structure):
    """What lies in front of a call's arguments."""

    _fields_ = (
        ("kernel", ctypes.c_int),
        ("quiet", ctypes.c_int),
        ("product", ctypes.c_int),
        ("void_where", ctypes.c_int),
        ("past_call", ctypes.c_int),
        ("past_product", ctypes.c_int),
        ("also_where", ctypes.c_int),
        ("also_call", ctypes.c_int),
        ("also_product", ctypes.c_int),
        ("next_where", ctypes.c_int),
        ("next_call", ctypes.c_int),
        ("next_product", ctypes.c_int),
        ("quiet_B", ctypes.c_void_p),
        ("void_B", ctypes.c_void_p),
        ("also_B", ctypes.c_void_p),
        ("next_B", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Program:
    """Calls as the device reads them, and once more what their products read. rings: of weights, in each
    block; ring_bytes: of each.

    arrived, epochs: where blocks count whom they have waited for; they go on from launch to launch. cycles: the first
    block's clock at the end of each call of the last launch, 0 where the call was void.
    """

    calls: tuple[Call, ...]
    records: Tensor
    products: Tensor
    rings: int
    ring_bytes: int
    shared_bytes: int
    arrived: Tensor
    epochs: Tensor
    cycles: Tensor

    @classmethod
    def of(
        cls, calls: Sequence[Call], shape: KernelShape, blocks: int, device: torch.device
    ) -> Program:
        """Raises ValueError where the calls' inputs leave no room for weights."""
        room = -(-max(call.room_bytes for call in calls) // 128) * 128
        free = MOST_SHARED_BYTES - _FRONT_BYTES - room
        rings = 1 if shape.tensor_cores else WARPS  # RINGS of kernels/weights.cu
        ring = max(0, min(_MOST_RING_BYTES * WARPS // rings, free // rings // 128 * 128))
        for call in calls:
            if call.is_product:
                weights = call.arguments.weights
                if ring < shape.out_rows * shape.row_bytes(weights.chunk):
                    raise ValueError(
                        f"{shape.rows} rows of {weights.columns} inputs do not fit a multiprocessor's "
                        f"{MOST_SHARED_BYTES >> 10} KiB; decode fewer rows at once or in bfloat16"
                    )
        return cls(
            tuple(calls),
            _bytes_on(device, _records(calls)),
            _bytes_on(device, [bytes(call.arguments.weights) for call in calls if call.is_product]),
            rings,
            ring,
            _FRONT_BYTES + rings * ring + room,
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(blocks, dtype=torch.int32, device=device),
            torch.zeros(len(calls), dtype=torch.int64, device=device),
        )

    def part(self, first: int, end: int) -> ctypes.Structure:
        """The argument of a launch of the calls [first, end)."""
        products = (sum(call.is_product for call in self.calls[:place]) for place in (first, end))
        window = _WINDOW_BYTES if self.rings == WARPS else _SHARED_WINDOW_BYTES
        near = _NEAR_BYTES * WARPS // self.rings
        return structures()["Program"](
            self.records.data_ptr(), first, end, self.products.data_ptr(), *products, self.ring_bytes, window, near,
            self.arrived.data_ptr(), self.epochs.data_ptr(), self.cycles.data_ptr(),
        )  # fmt: skip


def _bytes_on(device: torch.device, records: Sequence[bytes]) -> Tensor:
    joined = bytearray(b"".join(records) or b"\0")
    return torch.frombuffer(joined, dtype=torch.uint8).to(device)


def _records(calls: Sequence[Call]) -> list[bytes]:
    numbers = list(accumulate((call.is_product for call in calls), initial=0))
    return [_record(calls, number, numbers) for number in range(len(calls))]


def _record(calls: Sequence[Call], number: int, products: Sequence[int]) -> bytes:
    """One call as the device reads it. products: of every place, the first product from there on."""
    call = calls[number]
    past, also = _past(calls, number, _why(call)), _past(calls, number, _why_also(call))
    header = _Header(
        kernel=call.kind.number, quiet=_quiet(call), product=products[number], void_where=int(call.void_where),
        past_call=past, past_product=products[past], also_where=int(call.also_where), also_call=also,
        also_product=products[also], quiet_B=_address(call.quiet_flags), void_B=_address(call.void_flags),
        also_B=_address(call.also_flags),
    )  # fmt: skip
    behind = calls[number + 1] if number + 1 < len(calls) else None
    # Of a chunk's end to know costs as much as the call.
    set_here = {flags.data_ptr() for flags in call.sets}
    if (
        behind
        and behind.void_where is not Void.NO_CHUNK_CLOSES
        and _address(behind.void_flags) not in set_here
    ):
        past = _past(calls, number + 1, _why(behind))
        header.next_where, header.next_call = int(behind.void_where), past
        header.next_product, header.next_B = products[past], _address(behind.void_flags)
    head, arguments = bytes(header), bytes(call.arguments)
    assert len(arguments) <= _ARGUMENT_BYTES, call.name
    return head.ljust(-(-len(head) // 16) * 16, b"\0") + arguments.ljust(_ARGUMENT_BYTES, b"\0")


_Reason = tuple[int | None, Void]
"""Address of flags, and what they have to say."""


def _why(call: Call) -> _Reason:
    return _address(call.void_flags), call.void_where


def _why_also(call: Call) -> _Reason:
    return _address(call.also_flags), call.also_where


def _past(calls: Sequence[Call], number: int, reason: _Reason) -> int:
    """The first call behind that is not void for that reason."""
    for place in range(number + 1, len(calls)):
        if reason not in (_why(calls[place]), _why_also(calls[place])):
            return place
    return len(calls)


def _quiet(call: Call) -> int:
    """As Call of kernels/program.cu has it."""
    if call.quiet_flags is None:
        return int(call.quiet)
    return 3 if call.quiet_where is Void.SOME_ROW_RUNS else 2


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
