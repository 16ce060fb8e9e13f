"""Gates that travel alone (fbs_rl.checkpoint): restored to the bit on their backbone, refused on any other."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.checkpoint import (
    added_tensors,
    apply_gates,
    backbone_tensors,
    save_gates,
    tensors_digest,
)
from fbs_rl.model import FBSConfig, FBSForCausalLM
from fbs_rl.model.configuration import OPTION_NAMES
from tests.tiny import LAYERS, SMALL, VOCAB, backbone, enliven, fresh, left_padded

IDS, MASK = left_padded(1, [22, 15])
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied qwen3": {"family": "qwen3", "tied": True, "segment_position": True},
    "noop": {"kv_on_skip": "noop", "skip_path": "identity", "gate_block": 3},
    "bare": {"paw": False, "chunk": False, "gate_inputs": "residual"},
}


def digest(model: Any) -> tuple[str, dict[str, Any]]:
    """Everything that a refused call could have changed."""
    return tensors_digest(model.state_dict()), model.config.to_dict()


def gated(model: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = model(IDS, MASK, gates="threshold", tau=0.5)
    return out.logits, out.skip


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates of a Llama model with the options of tests.tiny."""
    return save_gates(enliven(fresh()), tmp_path_factory.mktemp("made") / "gates")


# --- restored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_gates_restore_the_model_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = enliven(fresh(**MODELS[name])).to(dtype)
    model.config.tau, model.config.gates, model.config.gates_origin = 0.31, "threshold", "trained"
    folder = save_gates(model, tmp_path / "some" / "gates")
    assert folder == tmp_path / "some" / "gates"
    target = fresh(**MODELS[name]).to(dtype)
    wanted, skip = gated(model)
    assert not torch.equal(gated(target)[0], wanted) and skip.any()
    apply_gates(target, folder)
    assert torch.equal(gated(target)[0], wanted) and torch.equal(gated(target)[1], skip)
    assert digest(target)[0] == digest(model)[0]
    config = target.config
    assert (config.tau, config.gates, config.gates_origin) == (0.31, "threshold", "trained")


def test_gates_may_be_applied_in_another_dtype(artefact: Path) -> None:
    target = fresh().to(torch.bfloat16)
    apply_gates(target, artefact)
    assert digest(target)[0] == digest(enliven(fresh()).to(torch.bfloat16))[0]


def test_applying_twice_is_applying_once(artefact: Path) -> None:
    target = fresh()
    gated(target)  # fills what the preview head keeps between calls
    apply_gates(target, artefact)
    once = gated(target)
    apply_gates(target, artefact)
    assert torch.equal(gated(target)[0], once[0])
    assert torch.equal(once[0], gated(enliven(fresh()))[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_gates_folder_holds_nothing_of_the_backbone(name: str, tmp_path: Path) -> None:
    model = fresh(**MODELS[name])
    folder = save_gates(model, tmp_path / "gates")
    assert {p.name for p in folder.iterdir()} == {"gates.json", "gates.safetensors"}
    kept, plain = load_file(folder / "gates.safetensors"), backbone(model.config.backbone_type)
    assert set(kept) == set(model.state_dict()) - set(plain.state_dict())
    assert {n for n, _ in backbone_tensors(model)} == set(plain.state_dict())
    description = json.loads((folder / "gates.json").read_text())
    assert description["options"].keys() == OPTION_NAMES  # those at their defaults too
    assert description["parameters"] == sum(t.numel() for t in kept.values())
    assert description["backbone"]["layers"] == LAYERS


def test_the_digest_sees_names_shapes_types_and_bytes() -> None:
    tensor = torch.arange(6.0)
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.view(2, 3)},
        {"a": tensor.view(torch.int32)},
        {"a": -tensor},
        {"a": tensor, "b": torch.zeros(0)},
    ]
    assert len({tensors_digest(v) for v in variants}) == len(variants)
    wide = torch.arange(12.0).view(6, 2)[:, 0]  # not contiguous
    assert tensors_digest({"a": wide}) == tensors_digest({"a": wide.clone()})


# --- refused -----------------------------------------------------------------------------------------


def other_width() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return FBSForCausalLM.from_backbone(LlamaForCausalLM(config), FBSConfig(**SMALL))


def retrained() -> Any:
    model = fresh()
    with torch.no_grad():
        model.model.layers[3].input_layernorm.weight[5] += 0.1
    return model


def assert_refused(
    model: Any, folder: Path, *words: str, error: type[Exception] = ValueError
) -> None:
    """One sentence with these words, and neither the model nor any file has changed."""
    before, files = digest(model), sorted(folder.parent.rglob("*"))
    with pytest.raises(error) as caught:
        apply_gates(model, folder)
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text
    assert digest(model) == before and sorted(folder.parent.rglob("*")) == files


def test_another_configuration_is_refused_naming_both(artefact: Path) -> None:
    made_on, this = "(llama, 8 layers, width 48)", "(llama, 4 layers, width 32)"
    assert_refused(other_width(), artefact, "made on another backbone", made_on, this)
    assert_refused(
        fresh("qwen3"), artefact, "made on another backbone", made_on, "(qwen3, 8 layers"
    )


def test_other_weights_of_the_same_architecture_are_refused(artefact: Path) -> None:
    assert_refused(retrained(), artefact, "made on other weights of the same architecture")


@pytest.mark.parametrize(
    "options",
    [
        {"gate_inputs": "residual"},
        {"skip_path": "identity"},
        {"gate_block": 2},
        {"chunk_boundary_layer": 1},
        {"paw_rank": 16},
        {"segment_position": True},
    ],
    ids=str,
)
def test_options_with_other_tensors_are_refused(artefact: Path, options: dict[str, Any]) -> None:
    assert_refused(fresh(**options), artefact, "made with other options")


@pytest.mark.parametrize(
    "options",
    [
        {"kv_on_skip": "noop"},
        {"paw_inclusion": "hard"},
        {"gate_logit_clip": 2.0},
        {"chunk_cache": 3},
        {"paw_temperature": 1.0},
    ],
    ids=str,
)
def test_options_that_change_what_gates_do_are_refused(
    artefact: Path, options: dict[str, Any]
) -> None:
    """Same shapes, another function: the gates would be applied to a model they were not made for."""
    assert_refused(fresh(**options), artefact, "made with other options")


@contextmanager
def damaged(artefact: Path, root: Path) -> Iterator[Path]:
    copy = root / "damaged"
    shutil.copytree(artefact, copy)
    yield copy
    shutil.rmtree(copy)


def test_any_flipped_byte_and_any_lost_tail_is_noticed(artefact: Path, tmp_path: Path) -> None:
    size = (artefact / "gates.safetensors").stat().st_size
    header = int.from_bytes((artefact / "gates.safetensors").read_bytes()[:8], "little")
    assert 100 < header < size
    model = fresh()
    for place in (0, 9, 8 + header // 2, 8 + header, (header + size) // 2, size - 1):
        with damaged(artefact, tmp_path) as copy:
            content = bytearray((copy / "gates.safetensors").read_bytes())
            content[place] ^= 1
            (copy / "gates.safetensors").write_bytes(content)
            assert_refused(model, copy, "copy the gates folder again")
    for length in (0, 5, 8 + header // 2, size // 2, size - 1):
        with damaged(artefact, tmp_path) as copy:
            content = (copy / "gates.safetensors").read_bytes()
            (copy / "gates.safetensors").write_bytes(content[:length])
            assert_refused(model, copy, "copy the gates folder again")
    apply_gates(model, artefact)


def test_a_lost_tensor_is_noticed(artefact: Path, tmp_path: Path) -> None:
    with damaged(artefact, tmp_path) as copy:
        tensors = load_file(copy / "gates.safetensors")
        tensors.pop("model.preview.unk_R")
        save_file(tensors, copy / "gates.safetensors")
        assert_refused(fresh(), copy, "does not match its digest")


@pytest.mark.parametrize("name", ["gates.json", "gates.safetensors"])
def test_folders_without_their_files_are_refused(artefact: Path, tmp_path: Path, name: str) -> None:
    with damaged(artefact, tmp_path) as copy:
        (copy / name).unlink()
        assert_refused(fresh(), copy, "is no gates folder", error=FileNotFoundError)
    assert_refused(fresh(), tmp_path / "nowhere", "is no gates folder", error=FileNotFoundError)


def _without(*path: str) -> Callable[[str], bytes]:
    def edit(text: str) -> bytes:
        description = json.loads(text)
        inner = description
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return json.dumps(description).encode()

    return edit


DESCRIPTIONS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "half": (lambda text: text[: len(text) // 2].encode(), "is damaged"),
    "empty": (lambda _: b"", "is damaged"),
    "no UTF-8": (lambda _: b"\xff\xfe\x00", "gates.json"),
    "a list": (lambda _: b"[]", "gates.json"),
    "null": (lambda _: b"null", "gates.json"),
    "other format": (lambda text: text.replace('"format": 1', '"format": 7').encode(), "has gates format 7"),
    "no format": (_without("format"), "format"),
    "no backbone": (_without("backbone"), "gates.json"),
    "no options": (_without("options"), "gates.json"),
    "no fingerprint": (_without("backbone", "weights_fingerprint"), "gates.json"),
    "no digest": (_without("digest"), "gates.json"),
    "no tau": (_without("options", "tau"), "gates.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_damaged_descriptions_are_refused(artefact: Path, tmp_path: Path, case: str) -> None:
    edit, words = DESCRIPTIONS[case]
    with damaged(artefact, tmp_path) as copy:
        path = copy / "gates.json"
        path.write_bytes(edit(path.read_text()))
        assert_refused(fresh(), copy, words)


# --- written whole or not at all -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_target_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "gates"
    if kind == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        target.write_text("mine")
    before = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="exists already; name a new folder"):
        save_gates(fresh(), target)
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A disk that is full after `limit` bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _interrupted(model: Any, folder: Path) -> None:
    size = sum(t.numel() * t.element_size() for _, t in added_tensors(model))
    with file_size_limit(size // 2), pytest.raises((OSError, SafetensorError)):
        save_gates(model, folder)


def test_an_interrupted_save_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    model = enliven(fresh())
    before = digest(model)
    _interrupted(model, tmp_path / "gates")
    assert not (tmp_path / "gates").exists() and digest(model) == before


def test_an_interrupted_save_can_be_repeated(tmp_path: Path) -> None:
    model = enliven(fresh())
    _interrupted(model, tmp_path / "gates")
    folder = save_gates(model, tmp_path / "gates")
    assert [p.name for p in tmp_path.iterdir()] == ["gates"]
    target = fresh()
    apply_gates(target, folder)
    assert digest(target)[0] == digest(model)[0]
