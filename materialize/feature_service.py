"""The noun of what one model takes: features of several views, read at once. Frozen values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FeatureService"]


@dataclass(frozen=True, slots=True)
class FeatureService:
    """Features that one model takes. ``features``: view -> feature -> its name in the vector, in the vector's order; no name is there twice."""

    name: str
    features: dict[str, dict[str, str]]
    description: str = ""
