"""The worker's calls for clients that speak JSON: vLLM's /collective_rpc carries text, and no bytes."""

from __future__ import annotations

import base64
from typing import Any

from fbs_rl.serving.runner import FBSWorkerExtension


class FBSHttpExtension(FBSWorkerExtension):
    """FBSWorkerExtension, and its calls that take or return bytes once more in base64."""

    def fbs_update_gates_base64(self, packed: str) -> dict[str, Any]:
        """fbs_update_gates with GateBundle.pack() in base64; ValueError for what is no base64."""
        return self.fbs_update_gates(base64.b64decode(packed, validate=True))

    def fbs_take_traces_base64(self, keys: list[str] | None = None) -> list[dict[str, Any]]:
        """fbs_take_traces with each trace's `columns` in base64: decode them, then GateTrace.from_wire."""
        return [
            {**wire, "columns": base64.b64encode(wire["columns"]).decode()}
            for wire in self.fbs_take_traces(keys)
        ]
