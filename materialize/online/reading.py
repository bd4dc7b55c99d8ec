"""interim"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["AsyncReader", "ReadTerms"]


@dataclass(frozen=True, slots=True)
class ReadTerms:
    connect: float = 0.5
    read: float = 0.1
    deadline: float = 0.25
    replicas: bool = False


class AsyncReader(ABC):
    location: str

    @abstractmethod
    async def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]: ...
    @abstractmethod
    async def read_cell(self, view: str, name: str) -> bytes | None: ...
    @abstractmethod
    async def close(self) -> None: ...
