"""Gates that travel alone between processes: a version, a digest and the tensors that PPO may change.

Names are those of the Hugging Face checkpoint whatever tree of modules a process keeps. The digest is the one
of a gates folder (fbs_rl.checkpoint), so both say the same of the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fbs_rl.checkpoint import tensors_digest
from fbs_rl.model.preview import Paw, PreviewHead
from fbs_rl.model.skip_gate import SkipGate

_KIND = "fbs-gate-bundle-1"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


class GateParts(StrEnum):
    """Which parameters PPO changes, and a bundle therefore carries."""

    GATES = "gates"
    GATES_AND_PAW = "gates+paw"


@dataclass(frozen=True, slots=True, eq=False)
class GateBundle:
    """One version of the gates. tensors: on the CPU, contiguous, by checkpoint name; digest: of these.

    version counts up from 0; two bundles hold the same gates if their digests agree.
    """

    version: int
    digest: str
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        if self.version < 0:
            raise ValueError(f"a gate version counts from 0, got {self.version}")
        if not self.tensors:
            raise ValueError("a gate bundle needs at least one tensor, got none")

    @classmethod
    def of(cls, version: int, tensors: Mapping[str, Tensor]) -> GateBundle:
        """A copy of `tensors` as they are now, which later training does not reach."""
        kept = {
            name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, t in tensors.items()
        }
        return cls(version, digest_of(kept), kept)

    def pack(self) -> bytes:
        """A safetensors file in memory, with version and digest in its metadata."""
        metadata = {"kind": _KIND, "version": str(self.version), "digest": self.digest}
        metadata["seal"] = _seal(metadata)
        return save(self.tensors, metadata=metadata)

    @classmethod
    def unpack(cls, data: bytes) -> GateBundle:
        """The bundle that `data` was packed from; ValueError if it is foreign, cut off or altered."""
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ValueError(
                f"{len(data)} bytes are no whole gate bundle ({error}); send what pack() made"
            ) from error
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if metadata.get("kind") != _KIND:
            raise ValueError(
                f"these tensors are no gate bundle of the kind {_KIND}; send what pack() made"
            )
        if metadata.get("seal") != _seal(metadata) or digest_of(tensors) != metadata["digest"]:
            raise ValueError("the gate bundle was altered on its way; send it again")
        return cls(int(metadata["version"]), metadata["digest"], tensors)


def _seal(metadata: Mapping[str, str]) -> str:
    """sha256 over version and digest: an altered version must not pass as another one."""
    sealed = f"{metadata.get('version')} {metadata.get('digest')}"
    return hashlib.sha256(sealed.encode()).hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes in the order of the names, one tensor at a time."""
    return tensors_digest(dict(tensors))


def gate_tensors(model: nn.Module, parts: GateParts | str) -> dict[str, Tensor]:
    """The parameters themselves, no copies, of the gates (and previews) in `model`, by checkpoint name.

    model: any tree with SkipGate, Paw and PreviewHead modules below `layers.<index>`, wrapped or not.
    parts: "gates" or "gates+paw". Raises ValueError for another word, a tree without gates, a gate outside
    of layers, or two modules of one name.
    """
    if parts not in list(GateParts):
        raise ValueError(f"parts is {parts!r}; it must be one of {', '.join(GateParts)}")
    wanted = (SkipGate,) if parts == GateParts.GATES else (SkipGate, Paw, PreviewHead)
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, wanted):
            continue
        prefix = _checkpoint_prefix(path, module)
        for name, tensor in module.named_parameters(prefix):
            if name in found:
                raise ValueError(f"{name} occurs twice in this model; give the part that decodes")
            found[name] = tensor
    if not any(".skip_gate." in name for name in found):
        raise ValueError("this model has no gates; make it with gate on")
    return found


def _checkpoint_prefix(path: str, module: nn.Module) -> str:
    """What a checkpoint calls the module that a tree keeps at `path`."""
    if isinstance(module, PreviewHead):
        return "model.preview"
    layers = _LAYER.findall(path)
    if not layers:
        raise ValueError(
            f"a {type(module).__name__} lies at {path!r}; it must lie in a layer, below layers.<index>"
        )
    part = "skip_gate" if isinstance(module, SkipGate) else "paw"
    return f"model.layers.{layers[-1]}.{part}"


def apply_bundle(named: Mapping[str, Tensor], bundle: GateBundle) -> None:
    """Copy the bundle into the tensors `named`, in place and converted to their types; all of it or nothing.

    The bundle may hold a part of `named`. What was derived from the tensors before (PreviewHead and Paw keep
    such) is not touched: call forget_derived after it.
    Raises ValueError for a name that is not in `named`, another shape or kind of number, a value that is not
    finite (after conversion), or tensors that are not the digest's.
    """
    unknown = sorted(bundle.tensors.keys() - named.keys())
    if unknown:
        raise ValueError(
            f"gate version {bundle.version} names {len(unknown)} tensors that this model lacks, "
            f"{unknown[0]} first; send gates of a model with the same options"
        )
    if digest_of(bundle.tensors) != bundle.digest:
        raise ValueError(
            f"gate version {bundle.version} does not match its digest; send the bundle again"
        )
    converted = {
        name: _converted(name, tensor, named[name]) for name, tensor in bundle.tensors.items()
    }
    # Some engines make their weights in inference mode, outside of which these cannot be written.
    with torch.inference_mode():
        for name, tensor in converted.items():
            named[name].copy_(tensor)


def held_digest(named: Mapping[str, Tensor], bundle: GateBundle) -> str:
    """The bundle's digest if the tensors `named` hold its values, each in its own type; else that of what they hold."""
    held = {name: named[name] for name in bundle.tensors}
    sent = {name: tensor.to(named[name].dtype) for name, tensor in bundle.tensors.items()}
    found = digest_of(held)
    return bundle.digest if found == digest_of(sent) else found


def _converted(name: str, tensor: Tensor, target: Tensor) -> Tensor:
    """`tensor` in the type of `target`; ValueError if it does not fit there."""
    if tensor.shape != target.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the bundle and {tuple(target.shape)} in this model; "
            f"send gates of a model with the same options"
        )
    if tensor.is_floating_point() != target.is_floating_point():
        raise ValueError(
            f"{name} is {tensor.dtype} in the bundle and {target.dtype} in this model; "
            f"send gates of a model with the same options"
        )
    converted = tensor.to(target.dtype)
    if not bool(converted.isfinite().all()):
        raise ValueError(
            f"{name} holds values that are not finite as {target.dtype}; send gates from before they diverged"
        )
    return converted
