"""How fresh a feature view is online: what is wanted in, an event out once it is so. Runs in Airflow's triggerer."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow.triggers.base import BaseTrigger, TriggerEvent

from materialize.airflow import tasks
from materialize.errors import ConfigError, MaterializeError, UnavailableError
from materialize.model import from_us

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from materialize.model import FeatureView, Watermark
    from materialize.online.base import OnlineStore

__all__ = ["FreshnessTrigger", "Seen", "Wanted", "look"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a sensor waits for, see `materialize.airflow.sensors.FreshnessSensor`."""

    view: str
    store: str
    by: Literal["run", "event"]
    within: timedelta | None
    version: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for `from_dict`."""
        return asdict(self) | {"within": self.within and self.within.total_seconds()}

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> Wanted:
        within = known["within"]
        return cls(**known | {"within": None if within is None else timedelta(seconds=within)})


@dataclass(frozen=True, slots=True)
class Seen:
    """One look: whether it was fresh, where the view stands (JSON), and in words what was found, what was expected, and where to look."""

    fresh: bool
    stands: dict[str, Any]
    says: str


class FreshnessTrigger(BaseTrigger):
    """Looks every *poke_interval* seconds until the view is fresh or the *deadline* (seconds since 1970) is past.

    Ends with one event: ``{"fresh": ...}`` with where the view stands, ``{"late": ...}`` with what was found at the deadline, or
    ``{"error": ..., "says": ...}`` with the class and the text of an error that nobody can wait out. Its arguments are what
    Airflow stores: plain values and no secret, for *config* and Airflow's connections are read at each look. So a triggerer
    that is restarted goes on where the other stopped.
    """

    def __init__(
        self,
        *,
        wanted: dict[str, Any],
        config: str | None,
        dags_folder: str,
        poke_interval: float,
        deadline: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted, self.config, self.dags_folder = wanted, config, dags_folder
        self.poke_interval, self.deadline = poke_interval, deadline

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("wanted", "config", "dags_folder", "poke_interval", "deadline")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        yield TriggerEvent(await self.wait())  # type: ignore[no-untyped-call]

    async def wait(self) -> dict[str, Any]:
        """Look until there is something to tell: the payload of the event."""
        wanted = Wanted.from_dict(self.wanted)
        # Told in this process: its environment may name another folder than the worker's.
        folder = tasks.config_dir(Path(self.dags_folder)) if self.config is None else Path(self.config)
        while True:
            try:
                # In a thread: files and stores are read synchronously, and there Airflow's connections may be asked for, which
                # TriggerCommsDecoder.send fetches through the event loop without blocking it.
                seen = await asyncio.to_thread(look, wanted, folder, tasks.utcnow())
            except MaterializeError as error:
                return {"error": type(error).__name__, "says": str(error)}
            if seen.fresh:
                return {"fresh": seen.stands}
            left = self.deadline - tasks.utcnow().timestamp()
            if left <= 0:
                return {"late": seen.says}
            await asyncio.sleep(min(self.poke_interval, left))


def look(wanted: Wanted, folder: Path, now: datetime) -> Seen:
    """Compare the watermark with what is *wanted*. A store that does not answer is not fresh.

    Raises ConfigError for a view or store that the configuration in *folder* does not have or does not bring together, and what
    else nobody can wait out.
    """
    with tasks.opened(wanted.view, wanted.store, folder) as (view, online):
        expected = expectation(wanted, view)
        hint = (
            f"expected {' and '.join(expected.texts)}. Look after the last runs of the DAG materialize_{view.schedule}, "
            f"and run: materialize status {view.name}"
        )
        try:
            fresh, stands, found = compare(wanted, expected.within, view, online, now)
        except UnavailableError as error:
            return Seen(fresh=False, stands={}, says=f"found no answer ({error}); {hint}")
    return Seen(fresh, stands, f"found {found}; {hint}")


@dataclass(frozen=True, slots=True)
class Expectation:
    """The greatest age, which may come from the view's YAML, and everything that is wanted in words."""

    within: timedelta | None
    texts: list[str]


def expectation(wanted: Wanted, view: FeatureView) -> Expectation:
    if wanted.store not in view.online_stores:
        raise ConfigError(
            f"could not wait for feature view {view.name!r}: found the online store {wanted.store!r}, expected one of "
            f"{', '.join(view.online_stores)}, where it is served from. Nothing was read or written."
        )
    within = wanted.within
    if within is None and wanted.version is None:
        within = view.freshness
        if within is None:
            raise ConfigError(
                f"could not tell how fresh feature view {view.name!r} has to be: expected within or version in the sensor's arguments, "
                "or freshness in the view's YAML, found none of them. Nothing was read or written."
            )
    texts = [] if wanted.version is None else [f"version {wanted.version} or later"]
    if within is not None:
        run = f"a run that finished at most {within} ago, or no commit that waits for longer"
        texts.append(run if wanted.by == "run" else f"an event at most {within} old")
    return Expectation(within, texts)


def compare(
    wanted: Wanted, within: timedelta | None, view: FeatureView, online: OnlineStore, now: datetime
) -> tuple[bool, dict[str, Any], str]:
    """Whether the view is fresh, where it stands, and the same in words."""
    from materialize import watermark

    found = watermark.read(online, view.name)
    if found is None:
        return False, {}, "it never loaded"
    if found.version is None:
        return False, {}, "a rebuild that has not finished"
    event, finished = (None if us is None else from_us(us) for us in (found.event_us, found.finished_us))
    text = f"version {found.version}, whose run finished {ago(finished, now)}, with its newest event {ago(event, now)}"
    fresh = wanted.version is None or found.version >= wanted.version
    if fresh and within is not None:
        moment = finished if wanted.by == "run" else event
        fresh = moment is not None and now - moment <= within
        if not fresh and wanted.by == "run":
            fresh, more = nothing_waits(view, online, now, within)
            text += more
    return fresh, standing(wanted, found, finished, event), text


def nothing_waits(view: FeatureView, online: OnlineStore, now: datetime, within: timedelta) -> tuple[bool, str]:
    """Whether no commit has waited for longer than *within*, and in words. A run without new commits leaves the watermark as it is."""
    from materialize.freshness import freshness

    lag = freshness(view, online)
    waiting = lag.waiting_since
    text = (
        "no commit waits" if waiting is None else f"the oldest commit that is not online was made {ago(waiting, now)}"
    )
    return not lag.late(now, within), f", and {text}"


def standing(wanted: Wanted, found: Watermark, finished: datetime | None, event: datetime | None) -> dict[str, Any]:
    times = {"finished": finished, "event": event}
    return {"view": wanted.view, "store": wanted.store, "version": found.version} | {
        name: moment and moment.isoformat() for name, moment in times.items()
    }


def ago(moment: datetime | None, now: datetime) -> str:
    return "at an unknown time" if moment is None else f"{timedelta(seconds=round((now - moment).total_seconds()))} ago"
