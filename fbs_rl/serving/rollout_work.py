"""What rollouts took, in tokens and seconds; it adds up over chunks and workers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class RolloutWork:
    """What rollouts took. Tokens: generated, scored (given ones behind a prompt), read as prompts, and kept from
    earlier dense passes. Seconds of the three steps of a chunk."""

    generated_tokens: int = 0
    scored_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    dense_s: float = 0.0
    self_s: float = 0.0
    gold_s: float = 0.0

    def __add__(self, other: RolloutWork) -> RolloutWork:
        return RolloutWork(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    @classmethod
    def of_seconds(cls, step: str, seconds: float) -> RolloutWork:
        """step: "dense_s", "self_s" or "gold_s"."""
        return replace(cls(), **{step: seconds})

    def record(self) -> dict[str, float]:
        return asdict(self)
