"""A board, a moment and what a user may see in; out the cards of the page, which are also what the JSON holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from materialize.airflow.page.board import BACKFILL, SCHEDULES
from materialize.airflow.page.history import History
from materialize.model import from_us

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from datetime import datetime

    from materialize.airflow.page.board import Board, Standing
    from materialize.airflow.page.history import Run, Verified

__all__ = ["Card", "cards", "dag_ids", "facts", "run_path"]

Tone = Literal["good", "wait", "bad"]
#: What is wrong comes first.
ORDER: dict[Tone, int] = {"bad": 0, "wait": 1, "good": 2}


@dataclass(frozen=True, slots=True)
class Card:
    """A view in a store, as it is shown. ``label`` and ``tone``: the state in words for people, and how bad it is.

    ``run_id``: the run that moved the watermark, with its path where it was one of Airflow's. ``waiting``: how long the oldest
    commit has been waiting to come online. ``dag_paused`` None: Airflow does not know the DAG.
    """

    view: str
    store: str
    description: str
    owner: str
    dag_id: str
    dag_paused: bool | None
    label: str
    tone: Tone
    problem: str
    state: str | None
    watermark_version: int | None
    table_version: int | None
    event: datetime | None
    finished: datetime | None
    run_id: str | None
    run_path: str | None
    waiting: timedelta | None
    target: timedelta | None
    runs: tuple[Run, ...]
    verified: Verified | None

    @property
    def behind(self) -> int | None:
        """Table versions that are not online; None where that cannot be counted."""
        if self.watermark_version is None or self.table_version is None or self.replaced:
            return None
        return self.table_version - self.watermark_version

    @property
    def replaced(self) -> bool:
        """Whether the watermark is of another table, which was dropped and made again since."""
        versions = (self.watermark_version, self.table_version)
        return self.state == "behind" and None not in versions and versions[0] >= versions[1]  # type: ignore[operator]

    @property
    def share(self) -> float | None:
        """How much of its target the lag has used up, at most 1; None without a target or an answer."""
        if self.target is None or self.problem:
            return None
        return min(1.0, (self.waiting or timedelta()) / self.target)


def dag_ids(board: Board) -> set[str]:
    """Every DAG that something on *board* belongs to."""
    runs = (run for history in board.histories.values() for run in (*history.runs, history.verified) if run)
    return {*SCHEDULES.values(), BACKFILL} | {run.dag_id for run in runs if run.dag_id}


def cards(board: Board, now: datetime, visible: AbstractSet[str]) -> list[Card]:
    """The views whose schedule's DAG is *visible*, without runs of other DAGs that are not; what is wrong comes first."""
    found = [
        card(standing, board, now, visible)
        for standing in board.standings
        if SCHEDULES[standing.view.schedule] in visible
    ]
    return sorted(found, key=lambda one: (ORDER[one.tone], one.view, one.store))


def card(standing: Standing, board: Board, now: datetime, visible: AbstractSet[str]) -> Card:
    view, found = standing.view, standing.freshness
    mark = None if found is None else found.watermark
    history = board.histories.get((view.name, standing.store), History())
    label, tone = state(standing, now)
    dag_id = SCHEDULES[view.schedule]
    return Card(
        view=view.name,
        store=standing.store,
        description=view.description,
        owner=view.owner,
        dag_id=dag_id,
        dag_paused=board.paused.get(dag_id),
        label=label,
        tone=tone,
        problem=standing.problem,
        state=None if found is None else found.state,
        watermark_version=None if mark is None else mark.version,
        table_version=None if found is None else found.table_version,
        event=moment(None if mark is None else mark.event_us),
        finished=moment(None if mark is None else mark.finished_us),
        run_id=None if mark is None else mark.run_id,
        run_path=None if mark is None else path_of(mark.run_id, visible),
        waiting=None if found is None else found.age(now),
        target=view.freshness,
        runs=tuple(run for run in history.runs if run.dag_id is None or run.dag_id in visible),
        verified=seen(history.verified, visible),
    )


def state(standing: Standing, now: datetime) -> tuple[str, Tone]:
    """The state in words, and how bad it is. Only what is beyond its target, or gives no answer, is bad."""
    found, target = standing.freshness, standing.view.freshness
    if found is None:
        return "No answer", "bad"
    late = target is not None and found.late(now, target)
    if found.state == "up to date":
        return "Fresh", "good"
    if found.state == "behind":
        return ("Late", "bad") if late else ("On time", "good") if target is not None else ("Behind", "wait")
    label = "Never loaded" if found.state == "never loaded" else "Snapshot unfinished"
    return label, "bad" if late else "wait"


def seen(verified: Verified | None, visible: AbstractSet[str]) -> Verified | None:
    hidden = verified is not None and verified.dag_id is not None and verified.dag_id not in visible
    return None if hidden else verified


def moment(us: int | None) -> datetime | None:
    return None if us is None else from_us(us)


def path_of(run_id: str, visible: AbstractSet[str]) -> str | None:
    """The path of the run ``<DAG>/<run>`` or ``<DAG>/<run>/<task>``; None when its DAG is not *visible* or it is none of Airflow's."""
    dag_id, _, rest = run_id.partition("/")
    return run_path(dag_id, rest.partition("/")[0]) if dag_id in visible and rest else None


def run_path(dag_id: str | None, run_id: str | None) -> str | None:
    """The path of a run in Airflow's UI, below its base; None for what was no run of Airflow."""
    if dag_id is None or run_id is None:
        return None
    return f"dags/{quote(dag_id, safe='')}/runs/{quote(run_id, safe='')}"


def facts(value: Any) -> Any:
    """*value* as JSON: dataclasses as objects, times in ISO format, durations in seconds."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, dict):
        return {name: facts(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [facts(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: facts(getattr(value, name)) for name in value.__dataclass_fields__}
    return value if value is None or isinstance(value, str | int | float) else value.isoformat()
