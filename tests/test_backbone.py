"""Backbones: what a name means, what is refused, what is copied, and the weights that the installation carries."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fbs_rl.checkpoint import added_tensors, backbone_tensors
from fbs_rl.data.samples import load_sample
from fbs_rl.model import FBSConfig, FBSForCausalLM
from fbs_rl.model.backbone import ModelSource, config_digest, load_backbone, weights_fingerprint
from tests.tiny import LAYERS, SMALL, VOCAB, assert_same, backbone, fresh, stepwise

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


# --- names ---------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and home, with a model folder, a .gguf file, an empty folder and a plain file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("alias", ["smollm2-135m", "SmolLM2-135M"])
def test_the_alias_is_the_file_that_the_installation_carries(alias: str) -> None:
    source = ModelSource.parse(alias)
    assert source.gguf_file is not None and source.gguf_file.endswith(".gguf")
    assert (Path(source.name) / source.gguf_file).stat().st_size > 50_000_000
    assert source.label == f"{source.name}/{source.gguf_file}"


def test_folders_files_and_hub_ids(home: Path) -> None:
    parse = ModelSource.parse
    assert parse(str(home / "model")) == ModelSource(str(home / "model"))
    assert parse("model") == parse("./model") == ModelSource("model")
    assert parse("~/model") == ModelSource(str(home / "model"))
    assert parse(str(home / "weights.gguf")) == ModelSource(str(home), "weights.gguf")
    assert parse("weights.gguf") == ModelSource(".", "weights.gguf")
    assert parse("~/weights.gguf") == ModelSource(str(home), "weights.gguf")
    assert parse(str(home), "weights.gguf") == ModelSource(str(home), "weights.gguf")
    assert parse("Qwen/Qwen3-0.6B") == ModelSource("Qwen/Qwen3-0.6B")
    assert parse("gpt2", "a.gguf") == ModelSource("gpt2", "a.gguf")
    assert parse("model").label == "model"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.gguf", "there is no file nowhere.gguf"),
        ("model/weights.gguf", "there is no file model/weights.gguf"),
        ("empty", "holds no config.json"),
        ("./nowhere", "there is no model folder ./nowhere"),
        ("/nowhere", "there is no model folder /nowhere"),
        ("~/nowhere", "there is no model folder ~/nowhere"),
        ("a/b/c", "there is no model folder a/b/c"),
        ("file.txt", "there is no model folder file.txt"),
    ],
)
def test_paths_that_lead_nowhere(home: Path, name: str, words: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ModelSource.parse(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_folder_need_hold_no_model(home: Path) -> None:
    assert ModelSource.parse_tokenizer(str(home / "empty")).name == str(home / "empty")
    assert ModelSource.parse_tokenizer("~/empty").name == str(home / "empty")
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        ModelSource.parse_tokenizer("./nowhere")


# --- what is refused ------------------------------------------------------------------------------------


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCAB))


def _sliding() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=2, **SHAPE)
    )


def _scaled(rope_type: str, **fields: Any) -> PreTrainedModel:
    rope = {"rope_type": rope_type, "rope_theta": 100.0, "factor": 2.0, **fields}
    return LlamaForCausalLM(LlamaConfig(rope_parameters=rope, **SHAPE))


def _longrope() -> PreTrainedModel:
    factors = [1.0] * 4
    return _scaled(
        "longrope",
        short_factor=factors,
        long_factor=factors,
        original_max_position_embeddings=32,
    )


UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "gpt2": (_gpt2, "is a gpt2 model; supported are Qwen3 (model type qwen3) and the Llama family"),
    "sliding": (_sliding, "uses sliding-window attention, which FBS does not support"),
    "dynamic": (lambda: _scaled("dynamic"), "uses dynamic rotary scaling"),
    "longrope": (_longrope, "uses longrope rotary scaling"),
}


@pytest.mark.parametrize("given", ["folder", "object"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_backbones_are_refused(name: str, given: str, tmp_path: Path) -> None:
    make, words = UNSUPPORTED[name]
    model = make()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        FBSForCausalLM.from_backbone(str(tmp_path) if given == "folder" else model)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_scalings_that_do_not_depend_on_the_length_are_exact() -> None:
    model = _scaled("linear").eval()
    made = FBSForCausalLM.from_backbone(copy.deepcopy(model), FBSConfig(**SMALL))
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, model(IDS).logits)


# --- what is copied --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("options", [None, "default", "paper", FBSConfig(**SMALL)], ids=type)
def test_backbone_weights_are_copied_exactly(family: str, options: Any, tmp_path: Path) -> None:
    original = backbone(family, tied=True)
    original.save_pretrained(tmp_path)
    for source in (str(tmp_path), copy.deepcopy(original)):
        made = FBSForCausalLM.from_backbone(source, options)
        found = dict(backbone_tensors(made))
        assert set(found) == set(original.state_dict()) and not made.training
        for name, tensor in original.state_dict().items():
            assert torch.equal(found[name], tensor), name
        assert not any(t.is_meta or t.isnan().any() for t in made.state_dict().values())
        with torch.no_grad():
            assert torch.equal(made(IDS).logits, original(IDS).logits)
        preset = (
            options if isinstance(options, FBSConfig) else FBSConfig.preset(options or "default")
        )
        assert made.config.kv_on_skip == preset.kv_on_skip
        assert made.config.paw_rank == preset.paw_rank
        assert made.config.paw_layers == preset.paw_layers


@pytest.mark.parametrize("given", ["folder", "object"])
def test_new_modules_follow_the_seed_and_leave_torch_alone(given: str, tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path)
    options, before = FBSConfig(**SMALL), torch.get_rng_state()
    models = [
        FBSForCausalLM.from_backbone(
            str(tmp_path) if given == "folder" else copy.deepcopy(backbone()), options, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (dict(added_tensors(m)) for m in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = {
        name for name in first if first[name].float().std(correction=0) > 0 and "_N" not in name
    }
    assert len(drawn) > 50
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    torch.manual_seed(5)
    different = dict(
        added_tensors(FBSForCausalLM.from_backbone(copy.deepcopy(backbone()), options))
    )
    assert all(torch.equal(first[name], different[name]) for name in first)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, "auto"])
def test_dtype(saved: torch.dtype, asked: torch.dtype | str, tmp_path: Path) -> None:
    original = copy.deepcopy(backbone()).to(saved)
    original.save_pretrained(tmp_path)
    made = FBSForCausalLM.from_backbone(str(tmp_path), FBSConfig(**SMALL), dtype=asked)
    wanted = asked if isinstance(asked, torch.dtype) else saved
    floats = [t for t in made.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {wanted}
    for name, tensor in backbone_tensors(made):
        assert torch.equal(tensor, original.state_dict()[name].to(wanted)), name


# --- telling backbones apart --------------------------------------------------------------------------------


def bound(**fields: Any) -> FBSConfig:
    return FBSConfig(**SMALL).bound_to(LlamaConfig(**{**SHAPE, "head_dim": 8, **fields}))


DIFFERENT: list[dict[str, Any]] = [
    {"vocab_size": 98},
    {"hidden_size": 48},
    {"intermediate_size": 65},
    {"num_hidden_layers": 5},
    {"num_attention_heads": 2},
    {"num_key_value_heads": 4},
    {"head_dim": 16},
    {"hidden_act": "gelu"},
    {"rms_norm_eps": 1e-5},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    {"attention_bias": True},
    {"mlp_bias": True},
]


def test_the_digest_changes_with_what_makes_the_function() -> None:
    digests = {config_digest(bound(**fields)) for fields in DIFFERENT}
    digests |= {config_digest(bound())}
    qwen3 = FBSConfig(**SMALL).bound_to(Qwen3Config(**{**SHAPE, "head_dim": 8}))
    assert len(digests | {config_digest(qwen3)}) == len(DIFFERENT) + 2


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_dropout": 0.3},
        {"dtype": "bfloat16"},
        {"use_cache": False},
        {"initializer_range": 0.5},
        {"eos_token_id": 3},
    ],
    ids=str,
)
def test_the_digest_ignores_what_does_not(fields: dict[str, Any]) -> None:
    assert config_digest(bound(**fields)) == config_digest(bound())


def test_the_digest_ignores_options_and_survives_a_folder(tmp_path: Path) -> None:
    config = FBSConfig(tau=0.1, gate_hidden=8).bound_to(LlamaConfig(**SHAPE, head_dim=8))
    assert config_digest(config) == config_digest(bound())
    config.save_pretrained(tmp_path)
    assert config_digest(FBSConfig.from_pretrained(tmp_path)) == config_digest(bound())


def fingerprint(model: Any) -> str:
    return weights_fingerprint(backbone_tensors(model))


def test_the_fingerprint_is_the_same_in_every_dtype_and_for_any_gates() -> None:
    for family in ("llama", "qwen3"):
        wanted = fingerprint(fresh(family))
        assert fingerprint(fresh(family).to(torch.bfloat16)) == wanted
        assert fingerprint(fresh(family, paw_rank=16, gate_block=2)) == wanted
        assert weights_fingerprint(backbone(family).named_parameters()) == wanted
    assert fingerprint(fresh("llama")) != fingerprint(fresh("qwen3"))


def test_the_fingerprint_sees_every_norm() -> None:
    model = fresh("qwen3")
    norms = [n for n, _ in backbone_tensors(model) if "norm" in n]
    assert len(norms) == 4 * LAYERS + 1
    seen = {fingerprint(model)}
    with torch.no_grad():
        for name in norms:
            model.get_parameter(name)[3] *= 1.02
            seen.add(fingerprint(model))
    assert len(seen) == len(norms) + 1


def test_training_the_backbone_changes_the_fingerprint() -> None:
    model = fresh()
    before = fingerprint(model)
    trained = [p for n, p in model.named_parameters() if n.endswith("layernorm.weight")]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    assert fingerprint(model) == before
    optimizer.step()
    assert fingerprint(model) != before


# --- the weights that the installation carries ------------------------------------------------------------


@dataclasses.dataclass
class Real:
    """SmolLM2-135M: model, the backbone that it was made of, and the token ids of two texts [1, 24]."""

    model: Any
    plain: PreTrainedModel
    ids: dict[str, Tensor]


@pytest.fixture(scope="module")
def real() -> Real:
    source = ModelSource.parse("smollm2-135m")
    plain = load_backbone(source, torch.float32)
    model: Any = FBSForCausalLM.from_backbone(copy.deepcopy(plain))
    with torch.no_grad():
        for layer in model.model.layers:  # gates as they come hardly differ between tokens
            if layer.skip_gate is not None:
                layer.skip_gate.out.weight.mul_(10)
    tokenizer = AutoTokenizer.from_pretrained(source.name, gguf_file=source.gguf_file)
    texts = {lang: load_sample(lang, "heldout")[0].text[:200] for lang in ("en", "zh")}
    ids = {lang: tokenizer(text, return_tensors="pt").input_ids for lang, text in texts.items()}
    return Real(model, plain, {lang: row[:, :24] for lang, row in ids.items()})


@pytest.mark.real_weights
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_real_dense_logits_are_the_backbones_to_the_bit(real: Real, lang: str) -> None:
    with torch.no_grad():
        wanted = real.plain(real.ids[lang]).logits
        assert torch.equal(real.model(real.ids[lang], gates="dense").logits, wanted)
    likely = wanted[:, :-1].log_softmax(-1).gather(-1, real.ids[lang][:, 1:, None])
    assert -likely.mean() < 6.0  # it has read text before: chance is 10.8 nats


@pytest.mark.real_weights
def test_real_greedy_text_is_the_backbones(real: Real) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    wanted: Any = real.plain.generate(real.ids["en"], **settings)  # pyright: ignore[reportCallIssue]
    found = real.model.generate(real.ids["en"], gates="dense", **settings)
    assert found.shape == (1, 30) and torch.equal(found, wanted)


@pytest.mark.real_weights
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_real_steps_decide_as_the_parallel_pass(real: Real, lang: str) -> None:
    ids, prompt = real.ids[lang], 8
    with torch.no_grad():
        prob = real.model(ids, gates="dense").gate_prob[:, 0, prompt:]
    free = [i for i in range(len(prob)) if i not in real.model.config.protected_layers]
    # In a wide gap of the middle fifth, so that few decisions are close; skips move what comes after them, so
    # of the three widest the one that leaves the most room once gates act.
    middle = (
        prob[free].flatten().sort().values[2 * prob[free].numel() // 5 :][: prob[free].numel() // 5]
    )
    tried = []
    for place in middle.diff().topk(3).indices:
        gates = {"gates": "threshold", "tau": middle[place : place + 2].mean().item()}
        with torch.no_grad():
            wanted = real.model(ids, decode_start=prompt, **gates)
        room = (wanted.gate_prob[free][:, :, prompt:] - gates["tau"]).abs().min().item()
        tried.append((room, gates, wanted))
    margin, gates, wanted = max(tried, key=lambda one: one[0])
    found = stepwise(real.model, ids, torch.ones_like(ids), prompt, **gates)
    assert 0.05 < wanted.skip[:, :, prompt:].float().mean() < 0.95
    assert margin > 1e-5  # no decision hangs on the last bits
    assert_same(found, wanted, tolerance=1e-3)  # logits reach 30


@pytest.mark.real_weights
def test_real_bfloat16_logits_are_the_backbones_to_the_bit(real: Real) -> None:
    model, plain = (copy.deepcopy(m).to(torch.bfloat16) for m in (real.model, real.plain))
    for ids in real.ids.values():
        with torch.no_grad():
            found, wanted = model(ids, gates="dense").logits, plain(ids).logits
        assert found.dtype is torch.bfloat16 and torch.equal(found, wanted)
