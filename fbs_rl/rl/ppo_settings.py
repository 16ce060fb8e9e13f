"""PPOSettings: everything that a Stage-2 run can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from fbs_rl.rl.advantages import Baseline
from fbs_rl.rl.answer_format import AnswerFormat, Heading, Turn
from fbs_rl.rl.gate_policy import GatePolicy, ProbabilityBound
from fbs_rl.rl.learner_settings import LearnerSettings
from fbs_rl.rl.reward import Sampler
from fbs_rl.rl.rollout import RolloutSettings
from fbs_rl.setting_bounds import require_above_zero, require_choice, require_not_negative
from fbs_rl.training.settings import CheckpointSettings, TrackingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSettings:
    """Which questions, and how they are put. Without a source: the sample that ships with the package."""

    sources: tuple[str, ...] = ()
    """Files, folders, patterns or hf:OWNER/NAME of questions; or one folder that question_pool made."""
    against: tuple[str, ...] = ()
    """Evaluation files whose questions must not be trained on."""
    carve_out: tuple[str, ...] = ()
    """"set/subject" of test splits that are trained on, and excluded from every evaluation."""
    languages: tuple[str, ...] = ("en", "zh")
    turn: Turn = Turn.COMPLETION
    heading: Heading = Heading.HARNESS
    shots: int = 0
    heldout_frac: float = 0.05
    max_prompt_tokens: int = 256

    def __post_init__(self) -> None:
        require_above_zero("questions", self, "max_prompt_tokens")
        if not self.languages:
            raise ValueError("questions.languages is empty; name en, zh or both")

    @property
    def answer_format(self) -> AnswerFormat:
        return AnswerFormat(turn=self.turn, heading=self.heading, shots=self.shots)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings:
    """What one update learns from: prompts x samples episodes."""

    prompts: int = 20
    """Questions of a step."""
    samples: int = 8
    """Episodes of each question; leave-one-out baselines need two."""
    chunk_prompts: int = 4
    """Questions that an engine runs at once. Part of a run's numbers: other batch sizes round differently."""
    sampled_by: Sampler = Sampler.DENSE
    """Who writes continuations: gated (the policy itself) or dense (the dense model, once a question)."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    """Of continuation tokens; 0 is greedy."""

    def __post_init__(self) -> None:
        require_above_zero("episodes", self, "prompts", "samples", "chunk_prompts")
        self.rollout(None, ())

    def rollout(
        self,
        policy: GatePolicy | None,
        end_ids: tuple[int, ...],
        tau: float = 0.8,
        never_skip: tuple[int, ...] = (),
    ) -> RolloutSettings:
        """What engines are told. policy: a GatePolicy, or None for thresholds at tau."""
        return RolloutSettings(
            sampled_by=self.sampled_by,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            policy=policy,
            tau=tau,
            never_skip=never_skip,
            end_ids=end_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """The vLLM engines of the rollouts, one Ray actor each."""

    engines: int = 2
    device: str = "auto"
    """cpu, cuda or auto (cuda where the cluster has GPUs)."""
    cpus_per_engine: float = 1
    threads_per_engine: int = 1
    gpus_per_engine: float = 1
    """A share below 1 puts several engines, or an engine and the learner, on one GPU."""
    learners: int = 1
    """Ranks of the learner."""
    gpus_per_learner: float = 1
    precision: str = "auto"
    """auto (fp32 on CPUs, bf16 on GPUs), fp32 or bf16."""
    max_model_len: int = 1024
    """Longest prompt and continuation together, in tokens."""
    kv_cache_gib: float = 1
    """Keys and values that each engine has room for; what does not fit is made again later."""
    start_deadline_s: float = 600
    call_deadline_s: float = 1800
    max_replacements: int = 3
    """Engines lost after which the run stops."""

    @property
    def cpus(self) -> float:
        """What the engines and the learner take of the cluster together."""
        return self.engines * self.cpus_per_engine + self.learners

    def __post_init__(self) -> None:
        require_above_zero(
            "fleet", self, "engines", "cpus_per_engine", "threads_per_engine", "gpus_per_engine",
            "learners", "gpus_per_learner", "max_model_len", "kv_cache_gib", "start_deadline_s", "call_deadline_s",
        )  # fmt: skip
        require_choice(
            "fleet",
            self,
            {"device": ("auto", "cpu", "cuda"), "precision": ("auto", "fp32", "bf16")},
        )
        require_not_negative("fleet", self, "max_replacements")
        if self.learners > 1 and self.gpus_per_learner <= 0.5:
            raise ValueError(
                f"fleet.gpus_per_learner is {self.gpus_per_learner}, so two of the {self.learners} ranks could be "
                f"given one GPU, which NCCL refuses; give more than 0.5, or one learner"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutSettings:
    """Held-out questions, with deterministic gates: before the first update, every so often, after the last."""

    every_steps: int = 20
    questions: int = 20
    example_episodes: int = 4
    """Episodes shown as text with what each token skipped."""

    def __post_init__(self) -> None:
        require_above_zero("evaluation", self, "every_steps", "questions")
        require_not_negative("evaluation", self, "example_episodes")


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    """model: an FBS folder, or a backbone (hub id, folder, .gguf, smollm2-135m) that is given gates first."""

    model: str = "smollm2-135m"
    preset: str = "default"
    """FBS options where `model` is a backbone."""
    seed: int = 0
    start_skip: float = 0.2
    """Share of layers that the gates of a backbone skip at the start."""
    max_bad_steps: int = 5
    """Steps with a loss or gradient that is not finite after which the run stops."""
    questions: QuestionSettings = field(default_factory=QuestionSettings)
    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    evaluation: HeldoutSettings = field(default_factory=HeldoutSettings)
    checkpoint: CheckpointSettings = field(
        default_factory=lambda: CheckpointSettings(every_steps=10)
    )
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    @property
    def steps(self) -> int:
        """Updates; each learns from the episodes of its own step."""
        return self.learner.updates

    def __post_init__(self) -> None:
        require_not_negative("", self, "max_bad_steps")
        if not 0 < self.start_skip < 1:
            raise ValueError(f"start_skip is {self.start_skip}; it must lie between 0 and 1")
        longest = self.questions.max_prompt_tokens + self.episodes.max_new_tokens
        # Engines make one token behind a text that they score.
        if longest >= self.fleet.max_model_len:
            raise ValueError(
                f"questions.max_prompt_tokens and episodes.max_new_tokens are {longest} tokens together, which with "
                f"one more is more than fleet.max_model_len ({self.fleet.max_model_len}); lower them or raise it"
            )
        baseline = self.learner.advantages.baseline
        if self.episodes.samples < 2 and baseline in (Baseline.LEAVE_ONE_OUT, Baseline.GROUP):
            raise ValueError(
                f"episodes.samples is 1, but learner.advantages.baseline {baseline!s} compares episodes of one "
                f"question; give at least 2, or another baseline"
            )
        bound = self.learner.policy.bound
        if bound is not ProbabilityBound.MIX:
            raise ValueError(
                f"learner.policy.bound is {bound!s}, but rollout engines draw with {ProbabilityBound.MIX!s} only; "
                f"leave it out"
            )
