"""FBSConfig: presets, what is refused and in which words, what is derived, what a folder keeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from fbs_rl.model import FBSConfig, FBSForCausalLM
from fbs_rl.model.configuration import OPTION_NAMES, PRESETS
from tests.tiny import LAYERS, SMALL, VOCAB, backbone, fresh, left_padded

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)

OTHER: dict[str, Any] = {
    "gates": "sample", "tau": 0.35, "gates_origin": "trained", "kv_on_skip": "noop", "skip_path": "identity",
    "adapter_rank": 5, "never_skip": [1, -2], "paw": False, "paw_layers": [0, 3], "paw_horizon": 9,
    "paw_window": "fixed", "paw_fixed_window": 4, "paw_inclusion": "hard", "paw_temperature": 0.5,
    "paw_window_hidden": 7, "paw_window_mean_frac": 0.4, "paw_rank": 48, "paw_vocab_size": 60, "paw_shortlist": 9,
    "paw_embed_space": "full", "paw_compression": "linear", "chunk": False, "chunk_boundary_layer": 3,
    "chunk_layers": [5, 6], "chunk_width": 24, "chunk_heads": 3, "chunk_cache": 17, "chunk_distance_buckets": 6,
    "chunk_close_rate": 0.5, "chunk_consistency": "infonce", "gate": True, "gate_inputs": "residual",
    "gate_residual_width": 9, "gate_preview_width": 10, "gate_hidden": 11, "gate_block": 2, "gate_ahead": 1,
    "gate_logit_clip": 3.0,
    "gate_bias_init": -1.0, "segment_position": True, "segment_max_sentences": 12, "segment_max_paragraphs": 13,
    "segment_max_tokens": 14, "loss_preview": 0.1, "loss_chunk": 0.2, "loss_consistency": 0.3, "loss_window": 0.4,
    "loss_gate": 0.6, "loss_distill": 0.7, "loss_preview_taps": 3,
    "loss_preview_every": 5, "loss_gate_entropy": 0.02, "loss_window_nats": 2.0, "loss_skip_target": 0.2,
    "loss_gate_ceiling": 0.2,
    "loss_imitation": 0.1,
    "loss_coverage_min": 0.7, "loss_confidence_min": 0.5,
}  # fmt: skip
"""Every option at a value that is not its default (`gate` aside, without which no gate mode is allowed)."""


def bound(**options: Any) -> FBSConfig:
    return FBSConfig(**{**SMALL, **options}).bound_to(backbone().config)


# --- presets and round trips ----------------------------------------------------------------------------


def test_presets() -> None:
    default, paper = FBSConfig.preset("default"), FBSConfig.preset("paper")
    # What a folder means that was saved before the option was there.
    assert {**default.to_dict(), "gate_ahead": 0} == FBSConfig().to_dict()
    changed = {k for k in OPTION_NAMES if getattr(default, k) != getattr(paper, k)}
    assert changed == {"kv_on_skip", "skip_path", "paw_layers", "gate_ahead", "loss_distill"}
    assert (default.gate_ahead, paper.gate_ahead) == (1, 0)
    assert (paper.kv_on_skip, paper.skip_path, paper.loss_distill) == ("noop", "identity", 0.0)
    assert (default.paw_layers, paper.paw_layers) == ("every:12", "every:4")
    assert FBSConfig.preset("paper", kv_on_skip="project", tau=0.5).kv_on_skip == "project"
    with pytest.raises(ValueError, match="no preset 'fast'; there are default, paper"):
        FBSConfig.preset("fast")
    assert all(FBSConfig.preset(name).bound_to(backbone().config) for name in PRESETS)


def test_every_option_survives_a_folder(tmp_path: Path) -> None:
    assert set(OTHER) == OPTION_NAMES
    default = FBSConfig()
    unchanged = {k for k in OTHER if OTHER[k] == getattr(default, k)}
    assert unchanged == {"gate"}
    for options in (OTHER, {"gate": False}):
        config = FBSConfig(**options).bound_to(backbone("qwen3").config)
        config.save_pretrained(tmp_path)
        found = AutoConfig.from_pretrained(tmp_path)
        assert type(found) is FBSConfig
        assert {k: getattr(found, k) for k in options} == options
        lost = {"_name_or_path"}
        mine, theirs = config.to_dict(), found.to_dict()
        assert {k: v for k, v in theirs.items() if k not in lost} == {
            k: v for k, v in mine.items() if k not in lost
        }


def test_a_folder_says_every_option_whatever_the_defaults_are(tmp_path: Path) -> None:
    """So a default that changes later changes no model that was saved before."""
    config = FBSConfig().bound_to(backbone().config)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() >= OPTION_NAMES
    assert {k: written[k] for k in OPTION_NAMES} == {k: config.to_dict()[k] for k in OPTION_NAMES}
    written["paw_layers"] = "every:4"  # as a folder has it that was made with another default
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert FBSConfig.from_pretrained(tmp_path).preview_layers == (0, 4)
    assert config.preview_layers == (0,)


def test_binding_takes_the_backbones_fields_and_keeps_the_options() -> None:
    plain = LlamaConfig(
        hidden_size=96,
        num_hidden_layers=12,
        num_attention_heads=6,
        vocab_size=500,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
        tie_word_embeddings=True,
        eos_token_id=[1, 2],
    )
    config = FBSConfig(**OTHER).bound_to(plain)
    assert config.backbone_type == "llama" and config.model_type == "fbs"
    assert {k: getattr(config, k) for k in OTHER} == OTHER
    for name in ("hidden_size", "vocab_size", "rms_norm_eps", "rope_parameters", "eos_token_id"):
        assert getattr(config, name) == getattr(plain, name), name
    assert config.layer_count == 12 and config.head_dim == 16 and config.num_key_value_heads == 6
    assert config.tie_word_embeddings is True


# --- refusals ------------------------------------------------------------------------------------------


POSITIVE = (
    "adapter_rank", "paw_horizon", "paw_fixed_window", "paw_temperature", "paw_window_hidden", "paw_rank",
    "paw_vocab_size", "paw_shortlist", "chunk_width", "chunk_heads", "chunk_cache", "chunk_distance_buckets",
    "gate_residual_width", "gate_preview_width", "gate_hidden", "gate_block", "gate_logit_clip",
    "segment_max_sentences", "segment_max_paragraphs", "segment_max_tokens", "loss_preview_taps",
    "loss_preview_every",
)  # fmt: skip
CHOICES = {
    "gates": ["replay", "off", None],
    "gates_origin": ["pretrained"],
    "kv_on_skip": ["stale"],
    "skip_path": ["none"],
    "paw_compression": ["max"],
    "gate_inputs": ["all"],
    "paw_window": ["learned"],
    "paw_inclusion": ["Soft"],
    "paw_embed_space": ["vocab"],
    "chunk_consistency": ["l2"],
}
ALONE: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, f"{name} is {value}; it must be above 0") for name in POSITIVE for value in (0, -1)),
    *(({name: value}, f"{name} is {value!r}; it must be one of") for name in CHOICES for value in CHOICES[name]),
    *(
        ({name: value}, f"{name} is {value}; it must lie in [0, 1]")
        for name in ("tau", "chunk_close_rate", "loss_skip_target", "paw_window_mean_frac")
        for value in (-0.1, 1.5, float("nan"))
    ),
    ({"paw_fixed_window": 16}, "paw_fixed_window is 16, above paw_horizon 15"),
    ({"chunk_width": 30, "chunk_heads": 4}, "chunk_width 30 is not divisible by chunk_heads 4"),
    ({"paw": False}, 'gate_inputs is "both" but paw is off'),
    ({"paw": False, "gate_inputs": "preview"}, 'gate_inputs is "preview" but paw is off'),
    ({"gate": False, "gates": "threshold"}, 'gates is "threshold" but the model has no gate'),
    *(
        ({"paw_layers": value}, f"paw_layers is {value!r}; give")
        for value in ("every:0", "every:-1", "every:", "every:x", "some", "")
    ),
    ({"paw_horizn": 4}, "unknown option 'paw_horizn'; did you mean 'paw_horizon'?"),
    ({"gate_bias": 4}, "unknown option 'gate_bias'; did you mean 'gate_bias_init'?"),
    ({"kv_on_skips": 4}, "unknown option 'kv_on_skips'; did you mean 'kv_on_skip'?"),
    ({"never_skips": 4}, "unknown option 'never_skips'; did you mean 'never_skip'?"),
    ({"loss_distil": 4}, "unknown option 'loss_distil'; did you mean 'loss_distill'?"),
    ({"segment_zzzzzzz": 4}, "unknown option 'segment_zzzzzzz'"),
]  # fmt: skip
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"paw_layers": []}, "paw is on but paw_layers is empty"),
    ({"paw_layers": [0, 8]}, "paw_layers names layer 8, but the model has layers 0 to 7"),
    ({"never_skip": [-9]}, "never_skip names layer -9, but the model has layers 0 to 7"),
    ({"chunk_layers": [9]}, "chunk_layers names layer 9, but"),
    ({"chunk_boundary_layer": 8}, "chunk_boundary_layer names layer 8, but"),
    ({"chunk_boundary_layer": 7}, "no layer lies above the boundary layer 7"),
    ({"chunk_layers": []}, "no layer lies above the boundary layer 2"),
    ({"chunk_layers": [2, 5]}, "chunk_layers starts at 2, not above the boundary layer 2"),
    ({"chunk_layers": [1], "chunk_boundary_layer": -2}, "not above the boundary layer 6"),
    ({"paw_layers": [1]}, "the first gate (layer 0) comes before the first preview (layer 1)"),
    ({"paw_layers": [5], "never_skip": [0]}, "the first gate (layer 1) comes before"),
    ({"paw_shortlist": 51}, "paw_shortlist is 51, above the preview vocabulary of 50 tokens"),
    ({"paw_shortlist": 98, "paw_vocab_size": 999}, "above the preview vocabulary of 97 tokens"),
    ({"paw_rank": 40}, 'paw_compression "conv" works on groups of 16 channels; 40 is not'),
]


def refusal(make: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make(**options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("options", "words"), ALONE, ids=str)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str) -> None:
    assert words in refusal(FBSConfig, **options)


@pytest.mark.parametrize(("options", "words"), TOGETHER, ids=str)
def test_options_that_contradict_the_backbone(options: dict[str, Any], words: str) -> None:
    assert FBSConfig(**{**SMALL, **options})  # fine until the number of layers is known
    assert words in refusal(bound, **options)


def test_the_whole_of_a_full_embedding_is_grouped_by_sixteen() -> None:
    config = LlamaConfig(hidden_size=40, num_hidden_layers=4, num_attention_heads=4)
    options = FBSConfig(paw_embed_space="full", paw_rank=40)
    assert "40 is not divisible by 16" in refusal(lambda: options.bound_to(config))
    assert FBSConfig(paw_embed_space="full", paw_compression="mean").bound_to(config)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_window_share_without_a_finite_logit_is_refused(share: float) -> None:
    assert "paw_window_mean_frac" in refusal(fresh, paw_window_mean_frac=share)


# --- derived -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("every:3", (0, 3, 6)),
        ("every:1", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("every:99", (0,)),
        ([0], (0,)),
        ([-1, 0, 3, 7], (0, 3, 7)),
        ((-8, -8), (0,)),
    ],
)
def test_preview_layers(layers: Any, wanted: tuple[int, ...]) -> None:
    assert bound(paw_layers=layers).preview_layers == wanted
    assert bound(paw_layers=layers, paw=False, gate_inputs="residual").preview_layers == ()


@pytest.mark.parametrize(
    ("count", "boundary", "readers"),
    [(2, 0, (1,)), (4, 1, (2, 3)), (8, 2, (4, 6)), (12, 2, (3, 6, 9)), (36, 2, (9, 18, 27))],
)
def test_boundary_and_reader_layers(count: int, boundary: int, readers: tuple[int, ...]) -> None:
    plain = LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=count)
    config = FBSConfig(**SMALL).bound_to(plain)
    assert config.boundary_layer == boundary and config.reader_layers == readers
    off = FBSConfig(**SMALL, chunk=False).bound_to(plain)
    assert off.boundary_layer is None and off.reader_layers == ()
    assert off.protected_layers == frozenset() and boundary in config.protected_layers


def test_negative_layers_count_from_the_end() -> None:
    negative = bound(
        paw_layers=[-8, -4], chunk_boundary_layer=-7, chunk_layers=[-1, -5], never_skip=[-3]
    )
    positive = bound(paw_layers=[0, 4], chunk_boundary_layer=1, chunk_layers=[3, 7], never_skip=[5])
    for name in ("preview_layers", "boundary_layer", "reader_layers", "gate_leaders"):
        assert getattr(negative, name) == getattr(positive, name), name
    assert negative.protected_layers == {1, 5} and negative.reader_layers == (3, 7)
    assert negative.forced_layers([-1, 0]) == {0, 1, 5, 7}
    assert "names layer -9" in refusal(lambda: negative.forced_layers([-9]))


@pytest.mark.parametrize(
    ("block", "never", "wanted"),
    [
        (1, [], (0, 1, 3, 4, 5, 6, 7)),
        (1, [0, -1], (1, 3, 4, 5, 6)),
        (2, [], (0, 2, 4, 6)),
        (2, [3], (0, 4, 6)),
        (3, [], (0, 3, 6)),
        (3, [6, 7], (0, 3)),
        (4, [], (0, 4)),
        (4, [0, 1, 3], (4,)),
        (9, [], (0,)),
        (1, range(8), ()),
    ],
)
def test_gate_leaders(block: int, never: Any, wanted: tuple[int, ...]) -> None:
    """The boundary layer, 2, never skips."""
    config = bound(gate_block=block, never_skip=list(never))
    assert config.gate_leaders == wanted
    assert config.protected_layers == {2, *(n % LAYERS for n in never)}
    gates = [
        layer.skip_gate is not None
        for layer in fresh(gate_block=block, never_skip=list(never)).model.layers
    ]
    assert tuple(i for i, there in enumerate(gates) if there) == wanted


@pytest.mark.parametrize(
    ("block", "never", "leaders", "protected"),
    [
        (1, [], (0, 2, 3, 4, 5, 6), {0, 2}),
        (1, [0, -1], (0, 2, 3, 4, 5), {0, 2, 7}),
        (2, [3], (3, 5), {0, 1, 2, 3}),
        (3, [], (2, 5), {0, 1, 2}),
        (9, [], (), set(range(8))),
    ],
)
def test_gates_a_layer_ahead(
    block: int, never: Any, leaders: tuple[int, ...], protected: set[int]
) -> None:
    """They are held by the layer in front of their block; nobody is in front of the first."""
    config = bound(gate_block=block, gate_ahead=1, never_skip=list(never))
    assert config.gate_leaders == leaders and config.protected_layers == protected
    free = set(range(LAYERS)) - protected
    assert {m for leader in leaders for m in config.block_asked_at(leader)} >= free


def test_gates_two_layers_ahead_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_ahead is 2; a gate reads the state in front of"):
        bound(gate_ahead=2)


def test_without_gates_every_layer_is_protected() -> None:
    config = bound(gate=False)
    assert config.protected_layers == set(range(LAYERS)) and config.gate_leaders == ()


def test_widths_of_the_preview() -> None:
    assert bound(paw_vocab_size=10**6).preview_vocab_size == VOCAB
    assert bound().preview_vocab_size == 50
    assert bound().preview_width == bound().pooled_width == 32
    assert bound(paw_embed_space="full").preview_width == 48
    assert bound(paw_compression="none", paw_embed_space="full").pooled_width == 5 * 48


# --- any mixture -----------------------------------------------------------------------------------------


LAYER_LISTS = st.lists(st.integers(-8, 7), min_size=1, max_size=3)
MIXTURES = st.fixed_dictionaries(
    {},
    optional={
        "gates": st.sampled_from(["dense", "threshold", "sample"]),
        "tau": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "kv_on_skip": st.sampled_from(["project", "noop"]),
        "skip_path": st.sampled_from(["identity", "adapter"]),
        "adapter_rank": st.integers(1, 3),
        "never_skip": st.one_of(LAYER_LISTS, st.just(list(range(LAYERS)))),
        "paw": st.booleans(),
        "paw_layers": st.one_of(st.sampled_from(["all", "every:4", "every:2", "every:9"]), LAYER_LISTS),
        "paw_horizon": st.integers(1, 4),
        "paw_fixed_window": st.integers(1, 4),
        "paw_window": st.sampled_from(["dynamic", "fixed"]),
        "paw_inclusion": st.sampled_from(["soft", "hard"]),
        "paw_rank": st.sampled_from([16, 20, 32]),
        "paw_vocab_size": st.sampled_from([1, 8, 97, 1000]),
        "paw_shortlist": st.sampled_from([1, 8, 97]),
        "paw_embed_space": st.sampled_from(["preview", "full"]),
        "paw_compression": st.sampled_from(["conv", "mean", "linear", "none"]),
        "chunk": st.booleans(),
        "chunk_boundary_layer": st.one_of(st.none(), st.integers(-1, 5)),
        "chunk_layers": st.one_of(st.none(), LAYER_LISTS),
        "chunk_heads": st.sampled_from([1, 3, 4, 32]),
        "chunk_cache": st.integers(1, 3),
        "chunk_distance_buckets": st.integers(1, 5),
        "chunk_consistency": st.sampled_from(["cosine", "infonce"]),
        "gate": st.booleans(),
        "gate_inputs": st.sampled_from(["residual", "preview", "both"]),
        "gate_block": st.integers(1, 9),
        "gate_ahead": st.integers(0, 1),
        "gate_logit_clip": st.sampled_from([0.01, 6.0, 50.0]),
        "gate_bias_init": st.sampled_from([-60.0, 0.0, 60.0]),
        "segment_position": st.booleans(),
        "segment_max_tokens": st.integers(1, 3),
        "loss_distill": st.sampled_from([0.0, 1.0]),
        "loss_preview_taps": st.integers(1, 9),
        "loss_skip_target": st.sampled_from([0.0, 1.0]),
    },
)  # fmt: skip


def test_any_mixture_runs_and_trains_or_is_refused() -> None:
    made, refused = [], []

    @PROPERTY
    @given(MIXTURES, st.sampled_from(["llama", "qwen3"]))
    def attempt(options: dict[str, Any], family: str) -> None:
        try:
            config = FBSConfig(**{**SMALL, **options})
            model = FBSForCausalLM.from_backbone(copy.deepcopy(backbone(family)), config)
        except ValueError as error:
            refused.append(str(error))
            return
        made.append(options)
        ids, mask = left_padded(2, [9, 4])
        labels = ids.masked_fill(mask == 0, -100)
        out = model(ids, mask, labels=labels, gate_seed=1, decode_start=2)
        assert out.loss.isfinite() and out.logits.isfinite().all()
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert not out.skip[sorted(model.config.protected_layers)].any()

    attempt()
    assert len(made) >= 15 and len(set(refused)) >= 3
    assert not any("\n" in text or len(text) < 20 for text in refused)
