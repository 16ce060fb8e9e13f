"""Reading and writing models: FBS folders, plain backbones, and gates that travel alone.

A gates artefact is a folder with `gates.safetensors` (the tensors that FBS added, nothing of the
backbone) and `gates.json` (options, digests). It applies to the backbone it was made on and to no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fbs_rl.model.backbone import ModelSource, check_family, config_digest, weights_fingerprint
from fbs_rl.model.configuration import OPTION_NAMES, FBSConfig
from fbs_rl.model.decoder import NEW_MODULES
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.segment_position import token_kinds

GATES_FORMAT = 1
_TENSORS, _DESCRIPTION = "gates.safetensors", "gates.json"
_SETTINGS = ("gates", "tau", "gates_origin")  # what a gates artefact sets; other options must agree
_DESCRIBED = {
    "": {"format", "backbone", "options", "digest"},
    "backbone": {"family", "config_digest", "weights_fingerprint", "layers", "hidden_size"},
    "options": set(_SETTINGS),
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    model: FBSForCausalLM
    tokenizer: PreTrainedTokenizerBase

    @property
    def trained(self) -> bool:
        """Whether the gates hold more than their initial, arbitrary values."""
        return self.model.config.gates_origin != "initial"


def load_model(
    name: str,
    gates: str | None = None,
    fbs: FBSConfig | str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | str = "auto",
) -> LoadedModel:
    """The model and tokenizer that `name` means: an FBS folder, or a backbone that becomes an FBS model.

    gates: folder of a gates artefact to apply. fbs: options or preset for a plain backbone without gates.
    tokenizer: where to read it from, if not from `name`.

    Raises FileNotFoundError, OSError or ValueError, in one sentence, before any weights are read where
    that is possible.
    """
    source = ModelSource.parse(name)
    config = source.read_config()
    is_fbs = isinstance(config, FBSConfig)
    if not is_fbs:
        check_family(config, name)
    if gates is not None:
        description = read_gates_description(gates)
        check_same_backbone(description, config, gates, name)
        fbs = FBSConfig(**description["options"])
    read_tokenizer = load_tokenizer(
        source if tokenizer is None else ModelSource.parse_tokenizer(tokenizer), config.vocab_size
    )
    if is_fbs:
        if fbs is not None and gates is None:
            raise ValueError(
                f"{name} is an FBS model with options of its own; leave the preset out"
            )
        model = _read_folder(source, dtype)
    else:
        model = FBSForCausalLM.from_backbone(source.name, fbs, source.gguf_file, dtype)
        if model.model.segment_position is not None:
            kinds_V = token_kinds(read_tokenizer, config.vocab_size)
            model.model.segment_position.kind_V.copy_(kinds_V)
    if gates is not None:
        apply_gates(model, gates)
    return LoadedModel(model, read_tokenizer)


def _read_folder(source: ModelSource, dtype: torch.dtype | str) -> FBSForCausalLM:
    try:
        read: Any = FBSForCausalLM.from_pretrained(
            source.name, dtype=dtype, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{source.name}: its weights could not be read ({reason}); copy the folder again"
        ) from error
    model, report = read
    if report["missing_keys"]:
        raise OSError(
            f"{source.name}: its weights lack {len(report['missing_keys'])} tensors, "
            f"{min(report['missing_keys'])} first; copy the folder again"
        )
    return model.eval()


def export_model(
    model: FBSForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    tau: float | None = None,
) -> None:
    """Write a Hugging Face folder of `model`, whole or not at all, and check that it holds every tensor.

    tau: the threshold at which it skips when a call does not say; None: such a call skips nothing.
    Replaces a folder of that name. Raises OSError if what was written lacks a tensor.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    settings = (model.config.gates, model.config.tau)
    if tau is not None:
        model.config.gates, model.config.tau = "threshold", tau
    try:
        model.save_pretrained(partial)
    finally:
        model.config.gates, model.config.tau = settings
    tokenizer.save_pretrained(partial)
    written: set[str] = set()
    for file in partial.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            written |= set(tensors.keys())
    wanted = set(model.state_dict())
    if model.config.tie_word_embeddings:
        wanted.discard("lm_head.weight")
    if wanted != written:
        odd = sorted(wanted ^ written)
        raise OSError(
            f"{folder}: {len(odd)} tensors are missing or not the model's, {odd[0]} first"
        )
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_tokenizer(source: ModelSource, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer at `source`; ValueError if its ids do not fit a model of `vocab_size` tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, gguf_file=source.gguf_file)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{source.name}: no tokenizer could be read there ({reason}); name one with --tokenizer"
        ) from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {source.name} has token ids up to {largest}, but the model knows {vocab_size} tokens; "
            f"use the tokenizer that the model was trained with"
        )
    # Embeddings are often padded to a round number; a tokenizer of half the size belongs to another model.
    if largest < 0.8 * vocab_size:
        raise ValueError(
            f"the tokenizer of {source.name} has {largest + 1} tokens, but the model knows {vocab_size}; "
            f"use the tokenizer that the model was trained with"
        )
    return tokenizer


# --- gates alone ----------------------------------------------------------------------------------


def added_tensors(model: FBSForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Names (as in a checkpoint) and tensors of everything that FBS added, buffers included."""
    for prefix, module in model.named_modules():
        if isinstance(module, NEW_MODULES):
            yield from ((name, t) for name, t in module.state_dict(prefix=f"{prefix}.").items())


def backbone_tensors(model: FBSForCausalLM) -> Iterator[tuple[str, Tensor]]:
    new = {name for name, _ in added_tensors(model)}
    yield from ((name, t) for name, t in model.state_dict().items() if name not in new)


def tensors_digest(named: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()


def save_gates(model: FBSForCausalLM, folder: str | Path) -> Path:
    """Write the gates artefact of `model`; the folder appears whole or not at all."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; name a new folder for the gates")
    tensors = {name: t.detach().cpu().contiguous() for name, t in added_tensors(model)}
    options = {k: v for k, v in model.config.to_dict().items() if k in OPTION_NAMES}
    description = {
        "format": GATES_FORMAT,
        "backbone": {
            "family": model.config.backbone_type,
            "config_digest": config_digest(model.config),
            "weights_fingerprint": weights_fingerprint(backbone_tensors(model)),
            "layers": model.config.layer_count,
            "hidden_size": model.config.hidden_size,
        },
        "options": options,
        "digest": tensors_digest(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
    }
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted save left
    partial.mkdir(parents=True)
    save_file(tensors, partial / _TENSORS)
    (partial / _DESCRIPTION).write_text(
        json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    )
    os.replace(partial, folder)
    return folder


def read_gates_description(folder: str | Path) -> dict[str, Any]:
    """The parsed gates.json; FileNotFoundError or ValueError if the folder is no gates artefact."""
    path = Path(folder) / _DESCRIPTION
    if not path.is_file() or not (Path(folder) / _TENSORS).is_file():
        raise FileNotFoundError(
            f"{folder} is no gates folder: it needs {_DESCRIPTION} and {_TENSORS}"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged ({error}); copy the gates folder again") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} is damaged (no JSON object); copy the gates folder again")
    if description.get("format") != GATES_FORMAT:
        raise ValueError(
            f"{folder} has gates format {description.get('format')}; this version reads {GATES_FORMAT}"
        )
    for part, wanted in _DESCRIBED.items():
        found = description.get(part) if part else description
        missing = wanted - found.keys() if isinstance(found, dict) else wanted
        if missing:
            raise ValueError(
                f"{path} is damaged (it lacks {min(missing)}); copy the gates folder again"
            )
    return description


def check_same_backbone(
    description: dict[str, Any], config: Any, gates: str | Path, name: str
) -> None:
    """ValueError if the gates were made on a backbone of another configuration than `config`."""
    made_on = description["backbone"]
    bound = (
        config
        if isinstance(config, FBSConfig)
        else FBSConfig(**description["options"]).bound_to(config)
    )
    if config_digest(bound) != made_on["config_digest"]:
        raise ValueError(
            f"the gates in {gates} were made on another backbone ({made_on['family']}, {made_on['layers']} layers, "
            f"width {made_on['hidden_size']}) than {name} ({bound.backbone_type}, {bound.layer_count} layers, "
            f"width {bound.hidden_size}); use the backbone they were made on"
        )


def apply_gates(model: FBSForCausalLM, folder: str | Path) -> None:
    """Copy the gates artefact in `folder` into `model`, in place; the model is unchanged if it does not fit.

    Raises ValueError for gates of another backbone (configuration or weights), of other options, or damaged.
    """
    description = read_gates_description(folder)
    check_same_backbone(description, model.config, folder, "this model")
    other = sorted(_differing_options(description["options"], model.config))
    if other:
        raise ValueError(
            f"the gates in {folder} were made with other options than this model has ({', '.join(other)}); "
            f"make the model with the gates' own options, as load_model does"
        )
    if (
        weights_fingerprint(backbone_tensors(model))
        != description["backbone"]["weights_fingerprint"]
    ):
        raise ValueError(
            f"the gates in {folder} were made on other weights of the same architecture; use the checkpoint "
            f"whose backbone they were trained with"
        )
    try:
        tensors = load_file(Path(folder) / _TENSORS)
    except SafetensorError as error:
        raise ValueError(
            f"{folder}/{_TENSORS} is damaged ({error}); copy the gates folder again"
        ) from error
    if tensors_digest(tensors) != description["digest"]:
        raise ValueError(
            f"{folder}/{_TENSORS} does not match its digest; copy the gates folder again"
        )
    mine = dict(added_tensors(model))
    wrong = sorted(
        name
        for name in mine.keys() | tensors.keys()
        if name not in mine or name not in tensors or mine[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"the gates in {folder} were made with other options: {len(wrong)} tensors differ, {wrong[0]} first"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
    for name in _SETTINGS:
        setattr(model.config, name, description["options"][name])


def _differing_options(options: dict[str, Any], config: FBSConfig) -> set[str]:
    """Options that change what the same tensors compute, and that the two do not share."""
    mine = json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k in OPTION_NAMES}))
    ignored = {name for name in OPTION_NAMES if name.startswith("loss_")} | set(_SETTINGS)
    return {
        n
        for n in mine.keys() | options.keys()
        if n not in ignored and mine.get(n) != options.get(n)
    }
