"""A list of calls as one launch: all blocks walk through it together, and weights of later calls come early."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbs_rl.decode.kernel_arguments import Call, structures
from fbs_rl.decode.kernel_source import KernelShape

WARPS = 8  # of a block, as in kernels/common.cu
MOST_SHARED_BYTES = 227 * 1024  # of one block on compute capability 9.0
_FRONT_BYTES = 4096  # FRONT_BYTES and ARGUMENT_BYTES of kernels/program.cu
_ARGUMENT_BYTES = 448
_MOST_SLOTS = 16
_MOST_RING_BYTES = 16 * 1024  # of a warp: more of them on their way keep small reads waiting
_NEAR_BYTES = 48 * 1024  # of a block: of weights that wait in the second cache
_LARGE = 2**20  # numbers of a matrix that is worth bringing near before its turn


class _Header(ctypes.Structure):
    """What lies in front of a call's arguments."""

    _fields_ = (
        ("kernel", ctypes.c_int),
        ("quiet", ctypes.c_int),
        ("ahead_call", ctypes.c_int),
        ("near_bytes", ctypes.c_int),
        ("void_where", ctypes.c_int),
        ("quiet_B", ctypes.c_void_p),
        ("void_B", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Program:
    """Calls as the device reads them. ring_bytes: shared memory in which a warp has weights on their way.

    arrived, epochs: where blocks count whom they have waited for; they go on from launch to launch. cycles: the first
    block's clock at the end of each call, of the last launch.
    """

    calls: tuple[Call, ...]
    records: Tensor
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
        ring = max(0, min(_MOST_RING_BYTES, free // WARPS // 128 * 128))
        for call in calls:
            if call.is_product:
                weights = call.arguments.weights
                slot = shape.out_rows * weights.chunk * (16 // shape.lane_numbers)
                weights.slots = min(_MOST_SLOTS, ring // slot)
                if weights.slots < 1:
                    raise ValueError(
                        f"{shape.rows} rows of {weights.columns} inputs do not fit a multiprocessor's "
                        f"{MOST_SHARED_BYTES >> 10} KiB; decode fewer rows at once or in bfloat16"
                    )
        held = bytearray(b"".join(_records(calls)))
        return cls(
            tuple(calls),
            torch.frombuffer(held, dtype=torch.uint8).to(device),
            ring,
            _FRONT_BYTES + WARPS * ring + room,
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(blocks, dtype=torch.int32, device=device),
            torch.zeros(len(calls), dtype=torch.int64, device=device),
        )

    def part(self, first: int, end: int) -> ctypes.Structure:
        """The argument of a launch of the calls [first, end)."""
        return structures()["Program"](
            self.records.data_ptr(), first, end, self.ring_bytes, self.arrived.data_ptr(), self.epochs.data_ptr(),
            self.cycles.data_ptr(),
        )  # fmt: skip


def _records(calls: Sequence[Call]) -> list[bytes]:
    products = [number for number, call in enumerate(calls) if call.is_product]
    return [
        _record(calls, number, [product for product in products if product > number])
        for number in range(len(calls))
    ]


def _record(calls: Sequence[Call], number: int, products: Sequence[int]) -> bytes:
    """One call as the device reads it. products: those behind it, of which it knows the next and the next large one."""
    call = calls[number]
    nothing = structures()["Weights"]()
    ahead = calls[products[0]].arguments.weights if products else nothing
    large = [weights for p in products[1:] if _large(weights := calls[p].arguments.weights)]
    later = large[0] if large else nothing
    header = _Header(
        kernel=call.kind.number, quiet=2 if call.quiet_flags is not None else int(call.quiet),
        ahead_call=products[0] if products else -1, near_bytes=_NEAR_BYTES if call.brings_near and large else 0,
        void_where=int(call.void_where), quiet_B=_address(call.quiet_flags), void_B=_address(call.void_flags),
    )  # fmt: skip
    arguments = bytes(call.arguments)
    assert len(arguments) <= _ARGUMENT_BYTES, call.name
    head = bytes(header) + bytes(ahead) + bytes(later)
    return head.ljust(-(-len(head) // 16) * 16, b"\0") + arguments.ljust(_ARGUMENT_BYTES, b"\0")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _large(weights: Any) -> bool:
    return sum(weights.rows) * weights.columns > _LARGE
