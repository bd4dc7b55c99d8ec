"""Every error that this package raises; each class says who acts on it.

    MaterializeError
    |- ConfigError          the author of the YAML
    |- OfflineStoreError    the owner of the Delta table
    |  |- QuarantineError   the same: too many of its rows cannot be stored
    |  `- RebuildNeeded     the operator: the change log cannot be followed, the snapshot can
    |- OnlineStoreError     the operator of the online store
    |  |- StoreFullError    the operator: give it memory; what is written stays
    |  `- UnavailableError  nobody yet: a retry may help
    |     `- StoreChangedError  nobody: it lost something of what a run wrote, which is written again
    |- RowsError            the caller of push: some of its rows cannot be stored
    |- WatermarkError       the operator: another run moved the watermark first
    |- BusyError            nobody yet: another run writes to the store; run again when it is done
    `- MismatchError        the operator: readers see something else than the table has

A message reads ``could not <do what>: <subject>: found <x>, expected <y>. <state and next step>.`` and never
holds a feature value, an entity key or a password. Every error survives pickling, because Airflow moves it between processes.
"""

from __future__ import annotations

__all__ = [
    "BusyError",
    "ConfigError",
    "MaterializeError",
    "MismatchError",
    "OfflineStoreError",
    "OnlineStoreError",
    "QuarantineError",
    "RebuildNeeded",
    "RowsError",
    "StoreChangedError",
    "StoreFullError",
    "UnavailableError",
    "WatermarkError",
]


class MaterializeError(Exception):
    """The base of every error raised on purpose by this package."""


class ConfigError(MaterializeError):
    """The configuration is wrong. Nothing was read or written; fix the file that the message names."""


class OfflineStoreError(MaterializeError):
    """The Delta table cannot be read exactly. Nothing was written by this step; the watermark stays."""


class QuarantineError(OfflineStoreError):
    """More rows cannot be stored than the view's ``max_quarantined`` allows. The others are online, which is harmless; the watermark stays."""


class RebuildNeeded(OfflineStoreError):
    """What changed since the watermark cannot be told from the log; ``materialize rebuild`` reads the whole snapshot.

    ``reason``: what is missing, in a few words.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class OnlineStoreError(MaterializeError):
    """The online store refused. Any part of the run may be written; the watermark stays, and running again is harmless."""


class StoreFullError(OnlineStoreError):
    """The online store has no memory left and evicts nothing. What is written stays, and the next run goes on from there.

    ``patience``: seconds for which the store is worth asking again.
    """

    patience: float = 30.0


class UnavailableError(OnlineStoreError):
    """The online store did not answer. Nothing is lost: the watermark stays, and running again is harmless.

    ``waited``: the store was waited for until its deadline already, so that only the scheduler tries again.
    """

    waited: bool = False


class StoreChangedError(UnavailableError):
    """The online store lost, or may have lost, something of what a run wrote. The watermark does not claim it; run again."""


class RowsError(MaterializeError, ValueError):
    """Rows that a caller gave cannot be stored as they are. None of them was written anywhere.

    ``rows``: why, by index, as far as single rows are to blame.
    """

    def __init__(self, message: str, rows: dict[int, str] | None = None) -> None:
        super().__init__(message, rows or {})
        self.rows = rows or {}

    def __str__(self) -> str:
        return str(self.args[0])


class WatermarkError(MaterializeError):
    """The watermark is not where this run found it: another run finished first, and what this run wrote is harmless."""


class BusyError(MaterializeError):
    """Another run holds the view in this store. This one moved no watermark, and what it wrote, if anything, is harmless; run again later."""


class MismatchError(MaterializeError):
    """More entities differ between the online store and the table than is tolerated; ``materialize verify VIEW --repair`` mends them."""
