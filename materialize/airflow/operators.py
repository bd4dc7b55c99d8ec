"""For other people's DAGs: a feature view and a store in, one task that does a whole run out."""

from __future__ import annotations

from datetime import datetime
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, get_args

from airflow.sdk import BaseOperator

from materialize.airflow import tasks
from materialize.airflow.dags import TASK_DEFAULTS
from materialize.model import Interval, Mode
from materialize.stop import stop_on

if TYPE_CHECKING:
    from pathlib import Path

    from airflow.sdk import Context

__all__ = ["MaterializeOperator"]


class MaterializeOperator(BaseOperator):
    """Bring the feature view *view* up to date in the online store *store*, in one task; returns the run report.

    *mode*: ``incremental`` goes from the watermark to the table's head, ``rebuild`` replaces everything online by the newest
    snapshot, ``backfill`` loads the rows with event times in ``[start, end)`` again; both ends are datetimes or ISO texts with a
    time zone. *config* is the configuration folder; without it ``MATERIALIZE_CONFIG``, or ``config`` beside the DAG's folder.

    Killed, cleared, repeated or at the same time as another run: an older value never replaces a newer one. A store that does
    not answer is tried again, any other error fails at once, unless the DAG's ``default_args`` or arguments say otherwise.
    The task emits an event of the asset that the DAGs of this package emit, with the counts as its extra, and none when
    readers see nothing new.
    """

    template_fields = ("view", "store", "start", "end")

    def __init__(
        self,
        *,
        view: str,
        store: str = "default",
        mode: Mode = "incremental",
        start: datetime | str | None = None,
        end: datetime | str | None = None,
        config: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        # Airflow has merged the default_args of the DAG and its groups into these.
        kwargs["default_args"] = TASK_DEFAULTS | (kwargs.get("default_args") or {})
        super().__init__(**kwargs)
        self.view, self.store, self.mode, self.start, self.end = view, store, mode, start, end
        self.config = config
        self.interval(rendered=False)
        if not (is_template(view) or is_template(store)):
            self.outlets = [*self.outlets, tasks.asset(view, store)]

    def execute(self, context: Context) -> dict[str, Any]:
        interval = self.interval(rendered=True)
        report = self.run_pipeline(interval, tried_again=context["ti"].try_number > 1)
        self.publish(context, report)
        return report

    def interval(self, *, rendered: bool) -> Interval | None:
        """The event times to load, None unless in a backfill. Templates count as right until they are *rendered*.

        Raises `ConfigError` with every problem of the arguments.
        """
        problems: list[str] = []
        if self.mode not in get_args(Mode):
            problems.append(f"mode: expected one of {', '.join(get_args(Mode))}, found {self.mode!r}")
        ends = [self.moment(name, getattr(self, name), problems, rendered=rendered) for name in ("start", "end")]
        start, end = ends
        if start and end and end <= start:
            problems.append(f"end: expected a time after the start {start.isoformat()}, found {end.isoformat()}")
        if problems:
            raise tasks.refused(self.task_id, problems)
        return Interval(start, end) if start and end else None

    def moment(self, name: str, value: Any, problems: list[str], *, rendered: bool) -> datetime | None:
        """The argument *name* as a time; adds to *problems* what the mode does not take."""
        if self.mode != "backfill":
            if value is not None:
                problems.append(f"{name}: expected nothing, because only a backfill takes an interval, found {value!r}")
            return None
        if is_template(value) and not rendered:
            return None
        text = value.isoformat() if isinstance(value, datetime) else None if value is None else str(value)
        return tasks.moment(name, text, self.mode, problems)

    def run_pipeline(self, interval: Interval | None, *, tried_again: bool) -> dict[str, Any]:
        """The whole run, in this process."""
        from materialize import pipeline

        folder = tasks.current_config_dir(self.config)
        with tasks.opened(self.view, self.store, folder) as (view, online), stop_on(SIGTERM) as count:
            run = pipeline.Run(self.store, tasks.run_id(self.task_id), tasks.utcnow, count)
            if interval is not None:
                report = pipeline.backfill(view, online, run, interval)
            else:
                report = (pipeline.rebuild if self.mode == "rebuild" else pipeline.incremental)(view, online, run)
            return tasks.told(report, online, tried_again=tried_again)

    def publish(self, context: Context, report: dict[str, Any]) -> None:
        """Emit the asset event, or none when readers see nothing new.

        Airflow emits an event for each asset among the outlets of a task that succeeds, and reads them when it has: this
        object is a copy made for this try, so its outlets are of this try alone.
        """
        asset = tasks.asset(self.view, self.store)
        self.outlets = [outlet for outlet in self.outlets if outlet != asset]
        tasks.mirror(report)
        if report["news"]:
            self.outlets = [*self.outlets, asset]
            context["outlet_events"][asset].extra = tasks.event_extra(report)


def is_template(value: Any) -> bool:
    """Whether *value* is known only when the task runs: a Jinja text, or what another task returns."""
    if isinstance(value, str):
        return "{{" in value or "{%" in value
    return value is not None and not isinstance(value, datetime)
