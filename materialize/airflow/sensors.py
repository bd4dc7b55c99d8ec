"""For other people's DAGs: a feature view and an age in, a task that succeeds once the view is fresh online out."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import structlog
from airflow.sdk import BaseSensorOperator, PokeReturnValue
from airflow.sdk.exceptions import AirflowSensorTimeout

from materialize import errors
from materialize.airflow import tasks
from materialize.airflow.dags import TASK_DEFAULTS

if TYPE_CHECKING:
    from airflow.sdk import Context

    from materialize.airflow.triggers import Wanted
    from materialize.errors import MaterializeError

__all__ = ["FreshnessSensor"]

log = structlog.get_logger(__name__)

#: How long after the sensor's own timeout Airflow gives up a trigger that nothing runs, with a message of its own.
GRACE = timedelta(minutes=5)


class FreshnessSensor(BaseSensorOperator):
    """Wait until the feature view *view* is fresh in the online store *store*; returns where it stands.

    Fresh is what is at most *within* old, by one of two measures:

    - ``by="run"``: the last run finished at most *within* ago, or every commit to the table that is older than that is online. The
      default, because it asks what this package is responsible for. A table that nobody writes to is fresh, however old its events
      are; a run that finds nothing new leaves no trace, so the table's log is read when the last run is older.
    - ``by="event"``: the newest event time online is at most *within* ago. For a table that always has new events: it also
      sees that whoever writes the table stopped. A table without new events is never fresh by it.

    And, or instead: the watermark is at *version* of the Delta table or later, which is a number or a template of one. Without
    *within* and *version*, ``freshness`` in the view's YAML counts. A view whose rebuild is under way is not fresh.

    It waits in the triggerer, which needs the configuration folder too (*config*; without it ``MATERIALIZE_CONFIG``, or ``config``
    beside the DAG's folder) and, by run, the right to read the table; ``deferrable=False`` waits in a worker. A store that does
    not answer is waited out until the timeout; an error that nobody can wait out fails the task at once, also with ``soft_fail``.
    """

    template_fields = ("view", "store", "version")

    def __init__(
        self,
        *,
        view: str,
        store: str = "default",
        within: timedelta | None = None,
        version: int | str | None = None,
        by: Literal["run", "event"] = "run",
        config: str | Path | None = None,
        poke_interval: timedelta | float = 60,
        deferrable: bool = True,
        **kwargs: Any,
    ) -> None:
        # A sensor has its own timeout; Airflow has merged the default_args of the DAG and its groups into these.
        defaults = TASK_DEFAULTS | {"execution_timeout": None}
        kwargs["default_args"] = defaults | (kwargs.get("default_args") or {})
        super().__init__(poke_interval=poke_interval, **kwargs)
        self.view, self.store, self.within, self.version, self.by = view, store, within, version, by
        self.config, self.deferrable = config, deferrable
        self.says = ""
        if problems := self.problems():
            raise tasks.refused(self.task_id, problems)

    def problems(self) -> list[str]:
        """What is wrong with the arguments that are no templates."""
        problems = []
        if self.by not in {"run", "event"}:
            problems.append(f"by: expected 'run' or 'event', found {self.by!r}")
        if self.within is not None and (not isinstance(self.within, timedelta) or self.within <= timedelta(0)):
            problems.append(f"within: expected a timedelta over 0, found {self.within!r}")
        if isinstance(self.version, (bool, float)) or (isinstance(self.version, int) and self.version < 0):
            problems.append(f"version: expected a version of the Delta table, 0 or more, found {self.version!r}")
        return problems

    def execute(self, context: Context) -> Any:
        if not self.deferrable:
            try:
                return super().execute(context)
            except AirflowSensorTimeout:
                raise self.timed_out(self.says) from None
        seen = self.poke(context)
        if not seen:
            self.wait_in_triggerer(context)
        return seen.xcom_value

    def poke(self, context: Context) -> PokeReturnValue:  # noqa: ARG002 - as Airflow calls it
        from materialize.airflow.triggers import look

        seen = look(self.wanted(), tasks.current_config_dir(self.config), tasks.utcnow())
        self.says = seen.says
        log.info("looked", view=self.view, store=self.store, fresh=seen.fresh, says=seen.says)
        return PokeReturnValue(seen.fresh, seen.stands)

    def wait_in_triggerer(self, context: Context) -> NoReturn:
        """Give the worker's slot back; `execute_complete` is called with the trigger's event."""
        from materialize.airflow.triggers import FreshnessTrigger

        timeout, dag = timedelta(seconds=self.timeout), context["dag"]
        trigger = FreshnessTrigger(
            wanted=self.wanted().to_dict(),
            config=None if self.config is None else str(self.config),
            dags_folder=str(Path(dag.fileloc).parent),
            poke_interval=self.poke_interval,
            deadline=(tasks.utcnow() + timeout).timestamp(),
        )
        self.defer(trigger=trigger, method_name="execute_complete", timeout=timeout + GRACE)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - as Airflow calls it
        """What the trigger's *event* means for the task: where the view stands, or the error that ended the waiting."""
        if "fresh" in event:
            stands: dict[str, Any] = event["fresh"]
            return stands
        if "late" in event:
            raise self.timed_out(event["late"])
        error: MaterializeError = getattr(errors, event["error"])(event["says"])
        raise error

    def wanted(self) -> Wanted:
        """What is waited for, with templates rendered."""
        from materialize.airflow.triggers import Wanted

        try:
            version = None if self.version is None else int(self.version)
        except ValueError:
            raise errors.ConfigError(
                f"could not use the arguments of task {self.task_id!r}: version: expected a version of the Delta table, found "
                f"{self.version!r}. Nothing was read or written. Correct the template in the DAG file."
            ) from None
        return Wanted(self.view, self.store, self.by, self.within, version)

    def timed_out(self, says: str) -> AirflowSensorTimeout:
        timeout = timedelta(seconds=self.timeout)
        return AirflowSensorTimeout(
            f"could not see feature view {self.view!r} fresh in online store {self.store!r} within the sensor's timeout of {timeout}: "
            f"{says}. Nothing was changed; clear this task to wait again."
        )
