"""Bounds of settings, each refused in one sentence that names the key and what would work.

section: what stands before the name in the key ("fleet" for fleet.engines), "" at the top. NaN lies in no bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def require_above_zero(section: str, settings: object, *names: str) -> None:
    """Raise ValueError unless each named setting is above 0; None is a setting that is not set, and passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{_key(section, name)} is {value}; it must be above 0")


def require_not_negative(section: str, settings: object, *names: str) -> None:
    """Raise ValueError unless each named setting is 0 or more."""
    for name in names:
        value = getattr(settings, name)
        if not value >= 0:
            raise ValueError(f"{_key(section, name)} is {value}; it cannot be negative")


def require_share(section: str, settings: object, *names: str) -> None:
    """Raise ValueError unless each named setting lies in [0, 1]."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{_key(section, name)} is {value}; it must lie in [0, 1]")


def require_choice(section: str, settings: object, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError unless each setting that `choices` names has one of the values given there."""
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise ValueError(
                f"{_key(section, name)} is {value!r}; it must be one of {', '.join(allowed)}"
            )


def _key(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
