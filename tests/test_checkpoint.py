"""FBS models in Hugging Face folders, and load_model: what is read is what was written, or a sentence says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from fbs_rl.checkpoint import load_model, save_gates
from fbs_rl.model import FBSConfig, FBSForCausalLM
from fbs_rl.model.baselines import removal_harm
from fbs_rl.model.configuration import OPTION_NAMES
from fbs_rl.model.gate_fit import fit_adapters, fit_gates
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny import HIDDEN, SMALL, VOCAB, backbone, enliven, fresh, left_padded

KINDS = [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)]
PLAIN = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}
OPTIONS: dict[str, Any] = {
    "tau": 0.45,
    "gates": "threshold",
    "kv_on_skip": "noop",
    "paw_layers": [0, -3],
    "chunk_boundary_layer": 1,
    "never_skip": [-1],
    "segment_position": True,
    "segment_max_tokens": 40,
    "loss_distill": 0.25,
}
IDS, _ = left_padded(1, [22, 22])


def logits(model: Any, **gates: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **gates).logits


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token a word, ids 0 to size - 1."""
    words = models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")  # pyright: ignore[reportCallIssue]
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made)


def assert_same_model(found: Any, wanted: Any) -> None:
    """Equal keys, tensors, logits and decisions, bit for bit."""
    mine, theirs = found.state_dict(), wanted.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    assert torch.equal(logits(found, gates="dense"), logits(wanted, gates="dense"))
    with torch.no_grad():
        one, other = (m(IDS, gates="threshold", tau=0.5) for m in (found, wanted))
    assert 0 < other.skip.sum() < other.skip.numel()
    assert torch.equal(one.skip, other.skip) and torch.equal(one.logits, other.logits)
    assert torch.equal(one.gate_prob, other.gate_prob)


def written_config(model: Any) -> dict[str, Any]:
    """to_dict() less what transformers fills in from where a model was read."""
    return {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}


# --- folders of transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, Path]:
    """(model, family, folder) of a model all of whose modules act, with unusual options."""
    family, tied = request.param
    model = enliven(fresh(family, tied, **OPTIONS))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, family, folder


@pytest.mark.parametrize("reader", [FBSForCausalLM, AutoModelForCausalLM])
def test_a_folder_gives_the_model_back(saved: tuple[Any, str, Path], reader: Any) -> None:
    model, _, folder = saved
    found = reader.from_pretrained(folder)
    assert type(found) is FBSForCausalLM and not found.training
    assert_same_model(found, model)
    assert written_config(found) == written_config(model)


def test_a_folder_holds_every_tensor_once(saved: tuple[Any, str, Path]) -> None:
    model, _, folder = saved
    tied = model.config.tie_word_embeddings
    wanted = set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert set(load_file(folder / "model.safetensors")) == wanted
    found: Any = FBSForCausalLM.from_pretrained(folder)
    shares = found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert shares is tied


def test_auto_config_reads_every_option(saved: tuple[Any, str, Path]) -> None:
    model, family, folder = saved
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is FBSConfig and config.backbone_type == family
    assert {k: getattr(config, k) for k in OPTIONS} == OPTIONS
    for name in OPTION_NAMES:
        assert getattr(config, name) == getattr(model.config, name), name
    for name in ("preview_layers", "boundary_layer", "reader_layers", "gate_leaders"):
        assert getattr(config, name) == getattr(model.config, name), name
    assert config.protected_layers == model.config.protected_layers == {1, 7}


def test_the_backbone_class_reads_the_folder_too(saved: tuple[Any, str, Path]) -> None:
    model, family, folder = saved
    original = backbone(family, model.config.tie_word_embeddings)
    found = PLAIN[family].from_pretrained(folder)
    assert type(found) is PLAIN[family]
    assert torch.equal(logits(found), logits(original))
    for name, tensor in original.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_buffers_survive(saved: tuple[Any, str, Path]) -> None:
    model, _, folder = saved
    found: Any = FBSForCausalLM.from_pretrained(folder)
    head, kinds = found.model.preview, found.model.segment_position.kind_V
    assert not torch.equal(head.token_ids_N, torch.arange(len(head.token_ids_N)))
    assert head.log_prior_N.unique().numel() > 5 and sorted(kinds.unique().tolist()) == [0, 1, 2]
    for name in ("preview.token_ids_N", "preview.log_prior_N", "segment_position.kind_V"):
        assert torch.equal(found.model.get_buffer(name), model.model.get_buffer(name)), name
    wanted = logits(model)
    kinds.zero_()
    assert not torch.equal(logits(found), wanted)  # they matter


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_folders(family: str, tmp_path: Path) -> None:
    backbone(family).save_pretrained(tmp_path / "plain")
    options = FBSConfig(**{**SMALL, **OPTIONS})
    narrow, original = (
        FBSForCausalLM.from_backbone(str(tmp_path / "plain"), options, dtype=torch.bfloat16)
        for _ in range(2)
    )
    enliven(narrow).save_pretrained(tmp_path / "fbs")
    found = FBSForCausalLM.from_pretrained(tmp_path / "fbs")
    assert found.dtype is torch.bfloat16
    assert_same_model(found, narrow)
    plain = PLAIN[family].from_pretrained(tmp_path / "fbs")
    assert torch.equal(logits(plain), logits(original, gates="dense"))
    wide = FBSForCausalLM.from_pretrained(tmp_path / "fbs", dtype=torch.float32)
    assert_same_model(wide, narrow.float())


def test_folders_in_shards(tmp_path: Path) -> None:
    model = enliven(fresh())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_model(FBSForCausalLM.from_pretrained(tmp_path), model)


# --- load_model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    tokenizer = word_tokenizer(VOCAB)
    model = enliven(fresh(tau=0.5))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCAB))
    made = {"fbs": model, "plain": backbone(), "qwen3": backbone("qwen3"), "gpt2": gpt2}
    for name, one in made.items():
        one.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    save_gates(model, root / "gates")
    backbone().save_pretrained(root / "mute")
    saveable_tokenizer().save_pretrained(root / "large")
    word_tokenizer(40).save_pretrained(root / "small")
    word_tokenizer(90).save_pretrained(root / "padded")
    for name in ("fbs", "plain"):
        for fault in ("truncated", "weightless", "headless", "garbled"):
            shutil.copytree(root / name, root / f"{name}_{fault}")
        weights = root / f"{name}_truncated" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        (root / f"{name}_weightless" / "model.safetensors").unlink()
        (root / f"{name}_headless" / "config.json").unlink()
        (root / f"{name}_garbled" / "config.json").write_text('{"model_type": "fb')
    _change_config(root, "contradictory", paw_fixed_window=99)
    _change_config(root, "misspelt", paw_horizn=3)
    return {p.name: str(p) for p in root.iterdir()} | {"nowhere": str(root / "nowhere")}


def _change_config(root: Path, name: str, **fields: Any) -> None:
    shutil.copytree(root / "fbs", root / name)
    path = root / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_fbs_folder_is_read_with_its_tokenizer(places: dict[str, str]) -> None:
    loaded = load_model(places["fbs"])
    assert_same_model(loaded.model, enliven(fresh(tau=0.5)))
    assert loaded.model.config.tau == 0.5 and not loaded.model.training
    assert loaded.tokenizer("w3 w96").input_ids == [3, 96]


@pytest.mark.parametrize("fbs", [None, "default", "paper", FBSConfig(**SMALL, tau=0.3)])
def test_a_plain_folder_becomes_an_fbs_model(places: dict[str, str], fbs: Any) -> None:
    loaded = load_model(places["plain"], fbs=fbs)
    assert torch.equal(logits(loaded.model), logits(backbone()))
    wanted = fbs if isinstance(fbs, FBSConfig) else FBSConfig.preset(fbs or "default")
    for name in ("tau", "paw_rank", "kv_on_skip", "skip_path", "loss_distill"):
        assert getattr(loaded.model.config, name) == getattr(wanted, name), name


@pytest.mark.parametrize("name", ["plain", "fbs"])
def test_gates_are_applied_while_loading(places: dict[str, str], name: str) -> None:
    loaded = load_model(places[name], gates=places["gates"])
    assert_same_model(loaded.model, enliven(fresh()))
    assert loaded.model.config.tau == 0.5


def test_dtype_and_tokenizer_from_elsewhere(places: dict[str, str]) -> None:
    loaded = load_model(places["mute"], tokenizer=places["padded"], dtype=torch.bfloat16)
    assert loaded.model.dtype is torch.bfloat16 and len(loaded.tokenizer) == 90


def test_a_home_folder_may_hold_model_and_tokenizer(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(places["fbs"]).parent))
    assert len(load_model("~/fbs").tokenizer) == VOCAB
    assert len(load_model("~/mute", tokenizer="~/padded").tokenizer) == 90


REFUSED: dict[str, tuple[dict[str, str], type[Exception], str]] = {
    "no folder": ({"name": "nowhere"}, FileNotFoundError, "there is no model folder"),
    "fbs without config": ({"name": "fbs_headless"}, FileNotFoundError, "holds no config.json"),
    "plain without config": ({"name": "plain_headless"}, FileNotFoundError, "holds no config.json"),
    "garbled config": ({"name": "fbs_garbled"}, OSError, "no model could be read there"),
    "garbled plain config": ({"name": "plain_garbled"}, OSError, "no model could be read there"),
    "contradictory options": ({"name": "contradictory"}, OSError, "paw_fixed_window is 99"),
    "misspelt option": ({"name": "misspelt"}, OSError, "did you mean 'paw_horizon'"),
    "truncated fbs": ({"name": "fbs_truncated"}, OSError, "weights could not be read"),
    "truncated plain": ({"name": "plain_truncated"}, OSError, "weights could not be read"),
    "no fbs weights": ({"name": "fbs_weightless"}, OSError, "weights could not be read"),
    "no plain weights": ({"name": "plain_weightless"}, OSError, "weights could not be read"),
    "other family": ({"name": "gpt2"}, ValueError, "is a gpt2 model; supported are Qwen3"),
    "no tokenizer": ({"name": "mute"}, OSError, "no tokenizer could be read there"),
    "ids beyond": ({"name": "fbs", "tokenizer": "large"}, ValueError, "token ids up to 299"),
    "too small": ({"name": "fbs", "tokenizer": "small"}, ValueError, "has 40 tokens, but"),
    "preset of fbs": ({"name": "fbs", "fbs": "paper"}, ValueError, "leave the preset out"),
    "no preset": ({"name": "plain", "fbs": "fast"}, ValueError, "no preset 'fast'; there are"),
    "no gates": ({"name": "plain", "gates": "small"}, FileNotFoundError, "is no gates folder"),
    "other gates": ({"name": "qwen3", "gates": "gates"}, ValueError, "made on another backbone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_refused_in_a_sentence(places: dict[str, str], case: str) -> None:
    arguments, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        load_model(**{k: places.get(v, v) for k, v in arguments.items()})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_written_anew_is_read_anew(places: dict[str, str], tmp_path: Path) -> None:
    """A run that overwrites its checkpoint must not meet what an earlier call remembers of it."""
    tokenizer = places["fbs"]
    for family in ("llama", "qwen3"):
        backbone(family).save_pretrained(tmp_path)
        loaded = load_model(str(tmp_path), fbs=FBSConfig(**SMALL), tokenizer=tokenizer)
        assert loaded.model.config.backbone_type == family


# --- are the gates more than arbitrary? ---------------------------------------------------------------


def _fitted() -> Any:
    model = fresh()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (4, 20), generator=draw)
    fit_adapters(model, ids, 4)
    fit_gates(model, ids, 4, removal_harm(model, ids, 4))
    return model


@pytest.mark.parametrize(("make", "trained"), [(fresh, False), (_fitted, True)])
def test_a_model_knows_whether_its_gates_are_initial(
    places: dict[str, str], tmp_path: Path, make: Callable[[], Any], trained: bool
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "model")
    save_gates(model, tmp_path / "gates")
    tokenizer = places["fbs"]
    assert load_model(str(tmp_path / "model"), tokenizer=tokenizer).trained is trained
    applied = load_model(places["plain"], gates=str(tmp_path / "gates"))
    assert applied.trained is trained
    assert load_model(places["plain"], fbs=FBSConfig(**SMALL)).trained is False
    assert torch.equal(logits(applied.model, gates="dense"), logits(backbone()))
    assert applied.model.config.hidden_size == HIDDEN
