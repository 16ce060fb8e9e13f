"""Settings: how they are read, what is refused and in which words, and what the shipped files hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from fbs_rl.config import find_settings, from_tree, load_settings, to_tree
from fbs_rl.data.prepare_config import PrepareConfig
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.training.settings import BatchSettings, PhaseSettings, PretrainSettings

CLASSES = {
    **{f"ppo_{n}": PPOSettings for n in ("default", "paper", "quickstart")},
    "data_default": PrepareConfig,
}
SHIPPED = sorted(path.stem for path in Path(str(files("configs"))).glob("*.yaml"))


def load(*overrides: str, file: str | None = None) -> PretrainSettings:
    return load_settings(PretrainSettings, file, ["data=d", *overrides])


def refused(*overrides: str, file: str | None = None) -> str:
    """The sentence with which these are refused."""
    with pytest.raises(ValueError) as caught:
        load(*overrides, file=file)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def leaves(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


# --- reading ----------------------------------------------------------------------------------------


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nbatch: {step_sequences: 8}\nphases: {steps: 7}\n")
    read = load("phases.steps=9", "optimizer.lr_gate=1e-3", file=str(file))
    assert (read.seed, read.batch.step_sequences, read.phases.steps) == (3, 8, 9)
    # YAML 1.1 reads 1e-3, without a point, as text; it has to become a number all the same.
    assert read.optimizer.lr_gate == 0.001
    assert read.batch.micro_sequences == BatchSettings().micro_sequences
    assert read.optimizer.beta2 == 0.95


def test_overrides_of_every_kind() -> None:
    read = load(
        "cluster.min_ranks=null", "cluster.gradient_checkpointing=true", "evaluation.skip_ratios=[0.1, 0.5]",
        "model.options.loss_gate=2", "model.options.paw_layers=all", "phases.steps=1_000", "tracking.project=a=b",
    )  # fmt: skip
    assert read.cluster.min_ranks is None and read.cluster.gradient_checkpointing is True
    assert read.evaluation.skip_ratios == [0.1, 0.5]
    assert read.model.options == {"loss_gate": 2, "paw_layers": "all"}
    assert read.phases.steps == 1000
    assert read.tracking.project == "a=b"


def test_the_last_override_of_a_key_wins() -> None:
    assert load("seed=1", "seed=2").seed == 2


def test_an_option_can_be_set_where_the_file_left_the_section_empty(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {options: }\n")
    read = load("model.options.loss_gate=2", file=str(tmp_path / "run.yaml"))
    assert read.model.options == {"loss_gate": 2}


def test_a_run_can_start_from_the_config_it_left(tmp_path: Path) -> None:
    first = load("phases.steps=9", "model.options.loss_gate=2", "cluster.min_ranks=1")
    written = {"command": "pretrain", **to_tree(first)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    assert load_settings(PretrainSettings, str(tmp_path / "config.yaml")) == first
    assert from_tree(PretrainSettings, to_tree(first)) == first


def test_to_tree_shares_nothing_with_the_settings() -> None:
    read = load("model.options.loss_gate=2")
    tree = to_tree(read)
    tree["model"]["options"]["loss_gate"] = 9
    tree["evaluation"]["skip_ratios"].append(0.9)
    assert read.model.options == {"loss_gate": 2} and 0.9 not in read.evaluation.skip_ratios


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().seed = 4  # pyright: ignore[reportAttributeAccessIssue]


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("phases.step=3", "phases.steps"),
        ("phase.steps=3", "phases.steps"),
        ("steps=3", "phases.steps"),
        ("optimizer.lr_gates=1", "optimizer.lr_gate"),
        ("batch.micro_sequence=1", "batch.micro_sequences"),
        ("sed=1", "seed"),
        ("model.optoins.loss_gate=1", "model.options"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    key = override.split("=")[0]
    assert refused(override) == f"unknown key {key}; did you mean {nearest}?"


def test_a_key_like_no_other_is_refused_without_a_guess() -> None:
    assert refused("zzqx=1") == "unknown key zzqx"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phases: {step: 3}", "unknown key phases.step; did you mean phases.steps?"),
        ("phasess: {steps: 3}", "unknown key phasess; did you mean phases?"),
        ("phases: 3", "phases must be a mapping, got 3"),
        ("phases:", "phases must be a mapping, got None"),
        ("- 1", "holds list, not a mapping of settings"),
        ("", "holds NoneType, not a mapping of settings"),
        ("a: [1", "is not readable YAML"),
        ("1: 2", "unknown key 1"),
        ("seed: true", "seed is True, which is no int"),
    ],
)
def test_a_bad_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    sentence = refused(file=str(file))
    assert sentence.startswith(str(file)) and said in sentence


def test_a_missing_file_lists_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(file="fast")
    assert (
        str(caught.value)
        == f"fast: no such settings file; the shipped ones are {', '.join(SHIPPED)}"
    )
    with pytest.raises(FileNotFoundError):
        load(file="elsewhere/default")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.steps=many", "phases.steps is 'many': input should be a valid integer"),
        ("phases.steps=2.5", "phases.steps is 2.5: input should be a valid integer"),
        ("phases.steps=null", "phases.steps is None: input should be a valid integer"),
        ("phases.steps=true", "phases.steps is True, which is no int"),
        ("phases.steps={a: 1}", "phases.steps is {'a': 1}: input should be a valid integer"),
        ("optimizer.lr_gate=fast", "optimizer.lr_gate is 'fast': input should be a valid number"),
        ("evaluation.skip_ratios=0.3", "evaluation.skip_ratios is 0.3: input should be a valid list"),
        ("evaluation.skip_ratios=[a]", "evaluation.skip_ratios.0 is 'a': input should be a valid number"),
        ("model.options=3", "model.options is 3: input should be a valid dictionary"),
        ("data=3", "data is 3: input should be a valid string"),
        ("phases=3", "phases is a section; set one of phases.steps, phases.observe_frac"),
        ("phases.steps.x=1", "phases.steps is a single setting and has no x"),
        ("data.x=1", "data is a single setting and has no x"),
        ("phases.steps", "'phases.steps' is not of the form section.key=value"),
        ("phases.steps=[1", "phases.steps=[1: the value is not readable"),
        ("model.options.loss_gat=1", "unknown option 'loss_gat'; did you mean 'loss_gate'?"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named(override: str, said: str) -> None:
    assert said in refused(override)


def test_what_has_no_default_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^data is not set, and it has no default$"):
        load_settings(PretrainSettings)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        *((f"{key}=0", f"{key} is 0") for key in (
            "batch.step_sequences", "batch.micro_sequences", "phases.steps", "cluster.ranks",
            "cluster.threads_per_rank", "checkpoint.every_steps", "checkpoint.keep", "checkpoint.keep_every_steps",
            "evaluation.every_steps", "evaluation.sequences", "evaluation.calibration_sequences",
            "tracking.log_every_steps",
        )),
        *((f"{key}=0", f"{key} is 0.0") for key in (
            "optimizer.clip_norm", "optimizer.epsilon", "phases.window_temperature_start",
            "phases.window_temperature_end", "phases.gate_temperature_start", "phases.gate_temperature_end",
            "cluster.room_deadline_s", "cluster.start_deadline_s", "cluster.step_deadline_s",
            "cluster.save_deadline_s", "cluster.cpus_per_rank",
        )),
        *((f"{key}=-1", f"{key} is -1") for key in (
            "optimizer.lr_backbone", "optimizer.lr_new", "optimizer.lr_gate", "optimizer.weight_decay",
            "phases.cross_entropy_steps", "cluster.max_restarts", "max_bad_steps", "evaluation.sample_prompts",
            "evaluation.sample_tokens",
        )),
        *((f"{key}={value}", f"{key} is {float(value)}; it must lie in [0, 1") for value in ("-0.1", "1.1") for key in (
            "optimizer.beta1", "optimizer.beta2", "optimizer.warmup_frac", "optimizer.lr_final_frac",
            "phases.observe_frac", "phases.skip_ramp_frac", "phases.skip_target", "phases.skip_target_start",
            "phases.tau_start", "phases.tau_end", "phases.preview_warmup_frac", "phases.decode_start_frac",
        )),
        ("optimizer.beta2=1", "it must lie in [0, 1)"),
        ("optimizer.lr_new=.nan", "optimizer.lr_new is nan"),
        ("phases.train=gates", "phases.train is 'gates'; it must be one of all, new"),
        ("phases.train_gated=some", "phases.train_gated is 'some'; it must be one of all, new, gates"),
        ("phases.gates=dense", "phases.gates is 'dense'; it must be one of sample, threshold"),
        ("phases.teacher=gpt", "phases.teacher is 'gpt'; it must be one of self, phase_1a"),
        ("phases.gate_start=warm", "phases.gate_start is 'warm'; it must be one of initial, fitted"),
        ("cluster.zero_stage=4", "cluster.zero_stage is 4; it must be 0, 1, 2 or 3"),
        ("cluster.zero_stage=0", "set cluster.zero_stage to 1"),
        ("cluster.precision=fp16", "cluster.precision is 'fp16'; it must be bf16 or fp32"),
        ("cluster.device=tpu", "cluster.device is 'tpu'; it must be auto, cpu or cuda"),
        ("cluster.attention=flash", "cluster.attention is 'flash'; it must be sdpa or eager"),
        ("cluster.min_ranks=2", "cluster.min_ranks is 2; it must lie between 1 and cluster.ranks (1)"),
        ("cluster.min_ranks=0", "cluster.min_ranks is 0; it must lie between 1"),
        ("evaluation.skip_ratios=[0.2, 1.0]", "evaluation.skip_ratios is [0.2, 1.0]; each must lie between 0 and 1"),
        ("tracking.wandb=on-ly", "tracking.wandb is 'on-ly'; it must be auto, offline or off"),
        ("model.preset=fast", "model.preset is 'fast'; it must be one of default, paper, none"),
        ("cluster.ranks=3", "which 3 ranks of 4 sequences do not divide; take a multiple of 12"),
        ("model.preset=none", "a model without gates has no phase 1b; set it to 1"),
    ],
)  # fmt: skip
def test_every_impossible_value_gets_a_sentence(override: str, said: str) -> None:
    assert said in refused(override)


def test_a_teacher_needs_a_phase_to_come_from() -> None:
    assert "leaves no phase 1a" in refused("phases.teacher=phase_1a", "phases.observe_frac=0")
    assert load("phases.teacher=phase_1a").phases.observed_steps == 50


def test_off_is_a_word_and_not_a_boolean(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("tracking: {wandb: off}")
    assert load(file=str(tmp_path / "run.yaml")).tracking.wandb == "off"
    assert load("tracking.wandb=off").tracking.wandb == "off"
    assert load("cluster.gradient_checkpointing=True").cluster.gradient_checkpointing is True


def test_edges_that_are_allowed() -> None:
    read = load(
        "optimizer.lr_backbone=0", "optimizer.beta1=0", "phases.observe_frac=1", "evaluation.skip_ratios=[]",
        "checkpoint.keep_every_steps=null", "max_bad_steps=0", "evaluation.sample_prompts=0",
    )  # fmt: skip
    assert read.phases.observed_steps == read.phases.steps
    assert load("model.preset=none", "phases.observe_frac=1").model.fbs_config().gate is False


# --- derived ----------------------------------------------------------------------------------------


def test_accumulation_is_what_is_left() -> None:
    batch = BatchSettings(step_sequences=24, micro_sequences=3)
    assert [batch.accumulation(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="take a multiple of 48"):
        batch.accumulation(16)


@pytest.mark.parametrize(
    ("frac", "train_gated", "start", "rebuilds"),
    [
        (0.5, "all", "initial", False),
        (0.5, "gates", "initial", True),
        (0.5, "all", "fitted", True),
        (0.0, "gates", "fitted", False),
        (1.0, "gates", "fitted", False),
    ],
)
def test_the_optimizer_starts_anew_where_it_has_to(
    frac: float, train_gated: str, start: str, rebuilds: bool
) -> None:
    phases = PhaseSettings(observe_frac=frac, train_gated=train_gated, gate_start=start)
    assert phases.rebuilds is rebuilds


# --- shipped files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_is_valid(name: str) -> None:
    cls: Any = CLASSES.get(name, PretrainSettings)
    read = load_settings(cls, name, ["data=d"] if cls is PretrainSettings else [])
    assert isinstance(read, cls)
    assert find_settings(f"{name}.yaml") == find_settings(name)


def test_the_paper_preset_is_the_papers_budget() -> None:
    """12 B tokens in batches of 2 M = 6,000 steps, 4 % of them warm-up = 240."""
    read = load(file="paper_stage1")
    sequence_tokens = 2048
    tokens = read.batch.step_sequences * sequence_tokens
    assert read.phases.steps == 6000
    assert math.isclose(tokens, 2e6, rel_tol=0.05)
    assert math.isclose(tokens * read.phases.steps, 12e9, rel_tol=0.05)
    assert round(read.optimizer.warmup_frac * read.phases.steps) == 240
    fbs = read.model.fbs_config()
    assert (fbs.kv_on_skip, fbs.skip_path, fbs.loss_distill) == ("noop", "identity", 0.0)
    assert read.phases.train_gated == "gates"
    assert read.batch.accumulation(read.cluster.ranks) == 4


def test_every_setting_has_one_type_and_there_are_few() -> None:
    names = [name for name, _ in leaves(PretrainSettings)]
    assert len(names) == len(set(names)) < 80
