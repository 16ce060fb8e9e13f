"""PretrainSettings: everything that a Stage-1 run can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fbs_rl.model.configuration import PRESETS, FBSConfig
from fbs_rl.setting_bounds import (
    require_above_zero,
    require_choice,
    require_not_negative,
    require_share,
)

PLAIN = "none"
"""The preset of a backbone without FBS modules: plain continual pretraining, the reference."""
_SHARES = (
    "observe_frac", "skip_ramp_frac", "skip_target", "skip_target_start", "tau_start", "tau_end",
    "preview_warmup_frac", "decode_start_frac", "harden_frac",
    "dense_rows_frac",
)  # fmt: skip
_TEMPERATURES = (
    "window_temperature_start", "window_temperature_end", "gate_temperature_start", "gate_temperature_end",
)  # fmt: skip


def _refuse_unless(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """backbone: hub id, folder, .gguf file or smollm2-135m. tokenizer: where to read it, if not there."""

    backbone: str = "smollm2-135m"
    tokenizer: str | None = None
    preset: str = "default"
    """default, paper, or none: a plain backbone, continually pretrained (the reference)."""
    options: dict[str, Any] = field(default_factory=dict)
    """FBS options over the preset's, as in FBSConfig."""

    def __post_init__(self) -> None:
        self.fbs_config()

    def fbs_config(self) -> FBSConfig:
        """The FBS options; raises ValueError for an unknown preset or option."""
        if self.preset == PLAIN:
            return FBSConfig(**{"paw": False, "chunk": False, "gate": False, **self.options})
        if self.preset not in PRESETS:
            names = ", ".join([*sorted(PRESETS), PLAIN])
            raise ValueError(f"model.preset is {self.preset!r}; it must be one of {names}")
        return FBSConfig.preset(self.preset, **self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """Two numbers; accumulation follows from them and the number of ranks."""

    step_sequences: int = 32
    """Sequences of one optimizer step, over all ranks."""
    micro_sequences: int = 4
    """Sequences that a rank runs at once."""

    def __post_init__(self) -> None:
        require_above_zero("batch", self, "step_sequences", "micro_sequences")

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a rank in a step; ValueError if the step cannot be cut so."""
        together = self.micro_sequences * ranks
        if self.step_sequences % together:
            raise ValueError(
                f"batch.step_sequences is {self.step_sequences}, which {ranks} ranks of "
                f"{self.micro_sequences} sequences do not divide; take a multiple of {together}"
            )
        return self.step_sequences // together


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW. Learning rates rise linearly, then fall along a cosine to lr_final_frac of themselves."""

    lr_backbone: float = 1e-5
    lr_new: float = 2e-4
    """Of PAW and Chunk-Head."""
    lr_gate: float = 2e-4
    """Of Skip-Gates and skip adapters."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_frac: float = 0.04
    lr_final_frac: float = 0.1

    def __post_init__(self) -> None:
        require_above_zero("optimizer", self, "clip_norm", "epsilon")
        for name in ("beta1", "beta2"):
            _refuse_unless(
                0 <= getattr(self, name) < 1,
                f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1)",
            )
        require_not_negative("optimizer", self, "lr_backbone", "lr_new", "lr_gate", "weight_decay")
        require_share("optimizer", self, "warmup_frac", "lr_final_frac")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSettings:
    """Phase 1a runs every layer and observes the gates; phase 1b executes them (SPEC 5)."""

    steps: int = 100
    observe_frac: float = 0.5
    """Share of the steps in phase 1a."""
    train: str = "all"
    """Phase 1a trains: all (backbone and new modules) or new (new modules only)."""
    train_gated: str = "all"
    """Phase 1b trains: all, new, or gates (Skip-Gates and skip path only: the paper's)."""
    gates: str = "sample"
    """How gates act in phase 1b: sample or threshold (both straight-through)."""
    harden_frac: float = 0.0
    """Share of phase 1b, at its end, in which gates skip where p >= 1/2 instead, as when they are used."""
    teacher: str = "self"
    """What phase 1b distils from: self (its own dense pass) or phase_1a (frozen copy from its end)."""
    skip_target_start: float = 0.05
    skip_target: float = 0.36
    skip_ramp_frac: float = 0.5
    """Share of phase 1b over which the target rises."""
    tau_start: float = 0.9
    tau_end: float = 0.8
    window_temperature_start: float = 1.0
    window_temperature_end: float = 0.25
    gate_temperature_start: float = 1.0
    gate_temperature_end: float = 0.25
    """Of threshold gates: how sharply p turns around tau."""
    preview_warmup_frac: float = 0.02
    cross_entropy_steps: int = 500
    """Steps before the boundary head may be trained by CTC."""
    decode_start_frac: float = 0.5
    """Gates act from a start drawn for each sequence, uniform in [0, this share of it)."""
    dense_rows_frac: float = 0.0
    """Share of a step's sequences in which no gate acts in phase 1b either: they train the dense pass."""
    gate_start: str = "initial"
    """Gates and adapters at the start of phase 1b: initial, or fitted (closed form, on the first data)."""

    def __post_init__(self) -> None:
        require_above_zero("phases", self, "steps")
        require_not_negative("phases", self, "cross_entropy_steps")
        choices = {
            "train": ("all", "new"),
            "train_gated": ("all", "new", "gates"),
            "gates": ("sample", "threshold"),
            "teacher": ("self", "phase_1a"),
            "gate_start": ("initial", "fitted"),
        }
        require_choice("phases", self, choices)
        require_share("phases", self, *_SHARES)
        require_above_zero("phases", self, *_TEMPERATURES)

    @property
    def observed_steps(self) -> int:
        """Steps of phase 1a."""
        return round(self.steps * self.observe_frac)

    @property
    def rebuilds(self) -> bool:
        """Whether the optimizer starts anew at phase 1b."""
        inside = 0 < self.observed_steps < self.steps
        return inside and (self.train != self.train_gated or self.gate_start == "fitted")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """One actor per rank, each with a DeepSpeed engine."""

    ranks: int = 1
    min_ranks: int | None = None
    """Go on with fewer ranks, down to this, when a node is lost; None: wait for all."""
    device: str = "auto"
    """cpu, cuda or auto (cuda where the cluster has a GPU per rank)."""
    cpus_per_rank: float = 1
    threads_per_rank: int = 1
    """Torch threads; on CPU, results are equal to the bit only between runs with the same number."""
    zero_stage: int = 1
    """0: nothing is sharded over ranks; 1: optimizer states are; 2: gradients too; 3: and the layers' matrices."""
    precision: str = "bf16"
    """bf16 (float32 master weights and moments) or fp32."""
    gradient_checkpointing: bool = False
    compile: bool = True
    """On GPUs, run layers and losses through torch.compile."""
    attention: str = "sdpa"
    document_attention: str = "mask"
    """Of packed documents on a GPU: mask (dense), or blocks (FlexAttention, which passes over what no token reads)."""
    room_deadline_s: float = 60
    """How long to wait for room for all ranks before trying fewer, or failing."""
    start_deadline_s: float = 600
    step_deadline_s: float = 1800
    save_deadline_s: float = 1800
    max_restarts: int = 10
    """Failures after which the run stops; a completed checkpoint in between resets the count."""

    @property
    def compiles(self) -> bool:
        return self.compile and self.zero_stage < 3

    def __post_init__(self) -> None:
        require_above_zero(
            "cluster", self, "ranks", "cpus_per_rank", "threads_per_rank", "room_deadline_s", "start_deadline_s",
            "step_deadline_s", "save_deadline_s",
        )  # fmt: skip
        require_not_negative("cluster", self, "max_restarts")
        _refuse_unless(
            self.min_ranks is None or 0 < self.min_ranks <= self.ranks,
            f"cluster.min_ranks is {self.min_ranks}; it must lie between 1 and cluster.ranks ({self.ranks})",
        )
        _refuse_unless(
            self.zero_stage in (0, 1, 2, 3),
            f"cluster.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3",
        )
        _refuse_unless(
            self.zero_stage > 0 or self.precision != "bf16",
            "cluster.zero_stage is 0 and cluster.precision bf16, which would train without float32 weights; "
            "set cluster.zero_stage to 1",
        )
        _refuse_unless(
            self.precision in ("bf16", "fp32"),
            f"cluster.precision is {self.precision!r}; it must be bf16 or fp32",
        )
        _refuse_unless(
            self.device in ("auto", "cpu", "cuda"),
            f"cluster.device is {self.device!r}; it must be auto, cpu or cuda",
        )
        _refuse_unless(
            self.attention in ("sdpa", "eager"),
            f"cluster.attention is {self.attention!r}; it must be sdpa or eager",
        )
        _refuse_unless(
            self.document_attention in ("mask", "blocks"),
            f"cluster.document_attention is {self.document_attention!r}; it must be mask or blocks",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    every_steps: int = 50
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: int | None = None
    """Also keep those of steps divisible by this."""

    def __post_init__(self) -> None:
        require_above_zero("checkpoint", self, "every_steps", "keep", "keep_every_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Held-out evaluation while training, at these steps, before the first and after the last."""

    every_steps: int = 50
    sequences: int = 32
    calibration_sequences: int = 8
    skip_ratios: list[float] = field(default_factory=lambda: [0.2, 0.36])
    sample_prompts: int = 2
    sample_tokens: int = 32

    def __post_init__(self) -> None:
        require_above_zero("evaluation", self, "every_steps", "sequences", "calibration_sequences")
        require_not_negative("evaluation", self, "sample_prompts", "sample_tokens")
        _refuse_unless(
            all(0 < r < 1 for r in self.skip_ratios),
            f"evaluation.skip_ratios is {self.skip_ratios}; each must lie between 0 and 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingSettings:
    wandb: str = "auto"
    """auto (online with a key, else offline), offline, or off."""
    project: str = "fbs_rl"
    log_every_steps: int = 1

    def __post_init__(self) -> None:
        _refuse_unless(
            self.wandb in ("auto", "offline", "off"),
            f"tracking.wandb is {self.wandb!r}; it must be auto, offline or off",
        )
        require_above_zero("tracking", self, "log_every_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainSettings:
    """data: folder of prepared shards. max_bad_steps: non-finite steps after which the run stops."""

    data: str
    seed: int = 0
    max_bad_steps: int = 5
    model: ModelSettings = field(default_factory=ModelSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    phases: PhaseSettings = field(default_factory=PhaseSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        require_not_negative("", self, "max_bad_steps")
        self.batch.accumulation(self.cluster.ranks)
        gated = self.model.fbs_config().gate
        if not gated and self.phases.observed_steps < self.phases.steps:
            raise ValueError(
                f"phases.observe_frac is {self.phases.observe_frac}, but a model without gates has no "
                f"phase 1b; set it to 1"
            )
        if self.phases.teacher == "phase_1a" and not self.phases.observed_steps:
            raise ValueError(
                "phases.teacher is phase_1a, but phases.observe_frac leaves no phase 1a; set teacher to self"
            )
