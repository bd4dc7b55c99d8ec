"""What runs did reaches a real OTLP receiver and a text file that Prometheus can read, and never fails a run or names a row."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from materialize import metrics, pipeline
from materialize.errors import UnavailableError
from materialize.metrics.names import METRICS
from materialize.online.sqlite import SqliteStore
from materialize.pipeline import Run
from materialize.retry import with_retry
from tests.otlp_receiver import receiving
from tests.projects import PAST, Project
from tests.tables import NOW, row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.tables import Table

PROJECT = Path(__file__).parent.parent
VIEW = {"view": "spending", "store": "default"}
#: Import of the command line, in modules; metrics that nobody asked for must not add to it.
HEAVY = ("opentelemetry", "prometheus_client", "requests", "google.protobuf")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    made = Project(tmp_path / "project", f"sqlite:///{tmp_path}/online.db")
    made.table.append(row("a", PAST + 1, 1.5), row("b", PAST + 1), row(None, PAST + 1))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of text files, to which this process writes."""
    (tmp_path / "metrics").mkdir()
    metrics.write_to(tmp_path / "metrics")
    yield tmp_path / "metrics"
    metrics.write_to(None)


def samples(folder: Path, name: str) -> dict[tuple[str, ...], float]:
    """The series of a metric by the values of its labels other than view and store, in the order of their names."""
    found = {}
    for path in folder.glob("*.prom"):
        for family in text_string_to_metric_families(path.read_text()):
            for sample in family.samples:
                if sample.name == name:
                    assert {label: sample.labels[label] for label in VIEW} == VIEW
                    found[tuple(sample.labels[label] for label in sorted(sample.labels) if label not in VIEW)] = (
                        sample.value
                    )
    return found


def load(table: Table, path: Path) -> None:
    with SqliteStore(f"sqlite:///{path}") as store:
        pipeline.incremental(table.view, store, Run("default", "run-id-x", lambda: NOW))


# --- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_names_follow_the_conventions_and_attributes_are_bounded(metric: metrics.Metric) -> None:
    assert re.fullmatch(r"materialize(\.[a-z][a-z_]*)+", metric.name)
    assert re.fullmatch(r"materialize(_[a-z]+)+", metric.prometheus)
    assert metric.unit in {"s", "By"} or re.fullmatch(r"\{[a-z]+\}", metric.unit)
    assert metric.prometheus.endswith("_total") == (metric.kind == "counter")
    assert metric.prometheus.removesuffix("_total").endswith("_seconds") == (metric.unit == "s")
    assert metric.prometheus.removesuffix("_total").endswith("_bytes") == (metric.unit == "By")
    assert not re.search(r"_(total|count|sum|bucket|created|info)_", metric.prometheus)
    assert metric.help.endswith(".")
    assert metric.labels[:2] == ("view", "store")
    assert set(metric.labels) <= {"view", "store", "mode", "reason", "outcome", "error", "result", "stage"}


def test_every_metric_is_in_the_documentation_and_no_other() -> None:
    text = (PROJECT / "docs" / "metrics.md").read_text()

    rows = dict(re.findall(r"^\| `(materialize\.[\w.]+)` \| `(materialize_\w+)` \|", text, re.MULTILINE))

    assert rows == {metric.name: metric.prometheus for metric in METRICS.values()}
    used = set(re.findall(r"materialize_\w+", "\n".join(re.findall(r"expr: (.*)", text))))
    assert used
    assert used <= {metric.prometheus for metric in METRICS.values()}


# --- without being asked -------------------------------------------------------------------------------------------------


def test_nothing_is_imported_unless_somebody_asks(project: Project) -> None:
    code = (
        "import sys; sys.argv = ['materialize', 'incremental']\n"
        "from materialize.cli import app\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in sys.modules if name.startswith({HEAVY!r})])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MATERIALIZE_"))}

    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"MATERIALIZE_CONFIG": str(project.config)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert ended.stdout.splitlines()[-1] == "[]", ended.stdout


# --- text files ----------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_its_report_says(table: Table, folder: Path, tmp_path: Path) -> None:
    table.append(row("a", 1), row("a", 2), row("b", 1), row(None, 1))

    load(table, tmp_path / "online.db")

    assert [path.name for path in folder.iterdir()] == ["materialize.spending.default.prom"]
    assert samples(folder, "materialize_runs_total") == {("ok",): 1}
    assert samples(folder, "materialize_rows_read_total") == {("incremental",): 4}
    assert samples(folder, "materialize_rows_quarantined_total") == {("incremental", "null join key"): 1}
    entities = samples(folder, "materialize_entities_total")
    assert entities == {
        ("incremental", "written"): 2,
        **{("incremental", outcome): 0 for outcome in ("stale", "unchanged", "expired", "deleted")},
    }
    assert samples(folder, "materialize_sent_bytes_total")["incremental",] > 0
    assert samples(folder, "materialize_last_success_timestamp_seconds") == {(): NOW.timestamp()}
    assert samples(folder, "materialize_last_run_quarantined") == {(): 1}
    assert samples(folder, "materialize_last_run_duration_seconds")[()] > 0


def test_counters_go_on_over_runs_and_gauges_are_the_last_ones(table: Table, folder: Path, tmp_path: Path) -> None:
    table.append(row("a", 1), row(None, 1))
    load(table, tmp_path / "online.db")
    table.append(row("a", 2), row("b", 1))

    load(table, tmp_path / "online.db")

    assert samples(folder, "materialize_runs_total") == {("ok",): 2}
    assert samples(folder, "materialize_entities_total")["incremental", "written"] == 3
    assert samples(folder, "materialize_last_run_quarantined") == {(): 0}
    assert samples(folder, "materialize_rows_quarantined_total") == {("incremental", "null join key"): 1}


def test_the_file_is_what_a_linter_of_prometheus_wants(table: Table, folder: Path, tmp_path: Path) -> None:
    table.append(row("a", 1), row(None, 1))

    load(table, tmp_path / "online.db")

    text = (folder / "materialize.spending.default.prom").read_text()
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        name = next(iter(family.samples)).name
        assert family.type == ("counter" if name.endswith("_total") else "gauge")
        assert family.documentation
        assert text.count(f"# HELP {name} ") == text.count(f"# TYPE {name} ") == 1
        assert len({tuple(sorted(sample.labels.items())) for sample in family.samples}) == len(family.samples)
    assert "run-id-x" not in text


@pytest.mark.parametrize("content", [b"", b"no metrics {", b"\xff\xfe", b"materialize_runs_total 3\n", b"other 1\n"])
def test_a_file_that_cannot_be_read_is_begun_anew(table: Table, folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "materialize.spending.default.prom").write_bytes(content)
    table.append(row("a", 1))

    load(table, tmp_path / "online.db")

    assert samples(folder, "materialize_runs_total") == {("ok",): 1}


def test_runs_at_the_same_time_lose_no_count(folder: Path) -> None:
    code = (
        "import sys; from datetime import datetime, timezone; from pathlib import Path\n"
        "from materialize import metrics; from materialize.model import RunReport\n"
        "metrics.write_to(Path(sys.argv[1]))\n"
        "for _ in range(50): metrics.finished(RunReport('spending', 'default', 'incremental', 0, 1, rows_read=1), datetime.now(timezone.utc))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=PROJECT) for _ in range(2)]

    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert samples(folder, "materialize_rows_read_total") == {("incremental",): 100}
    assert [path.suffix for path in folder.iterdir()] == [".prom"]


@pytest.mark.parametrize("broken", ["missing", "locked", "file"])
def test_metrics_that_cannot_be_written_are_a_warning(
    table: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    wrong = tmp_path / "metrics"
    if broken == "file":
        wrong.write_text("")
    if broken == "locked":
        wrong.mkdir()
    table.append(row("a", 1))
    metrics.write_to(wrong)
    handle = os.open(wrong, os.O_RDONLY) if broken == "locked" else None
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        load(table, tmp_path / "online.db")
    finally:
        metrics.write_to(None)
        if handle is not None:
            os.close(handle)

    assert "could not write metrics" in caplog.text
    assert "The run is not affected" in caplog.text


def test_a_failed_run_is_counted_by_its_error_with_its_retries(project: Project, folder: Path) -> None:
    project.configure(url="redis://127.0.0.1:1/0?timeout=0.5")

    ended = project.run("--metrics-dir", str(folder), "incremental")

    assert ended.returncode == 1
    assert samples(folder, "materialize_runs_total") == {("UnavailableError",): 1}
    assert samples(folder, "materialize_retries_total") == {("ConnectionError",): 3}
    assert samples(folder, "materialize_last_success_timestamp_seconds") == {}
    assert samples(folder, "materialize_last_run_timestamp_seconds")[()] > 0


def test_retries_and_waits_belong_to_the_run_that_had_them(table: Table, folder: Path, tmp_path: Path) -> None:
    answers: list[BaseException | None] = [UnavailableError("no answer"), None]

    def call() -> None:
        if error := answers.pop(0):
            raise error

    with_retry(call, sleep=lambda _: None)
    metrics.held_back(0.25)
    metrics.held_back(0.5)
    table.append(row("a", 1))
    load(table, tmp_path / "online.db")
    load(table, tmp_path / "online.db")

    assert samples(folder, "materialize_retries_total") == {("UnavailableError",): 1}
    assert samples(folder, "materialize_held_back_seconds_total") == {(): 0.75}


def test_status_writes_lag_versions_and_the_target(project: Project, folder: Path) -> None:
    project.configure(extra="freshness: 2h\n")
    project.json("--metrics-dir", str(folder), "incremental")
    project.table.append(row("c", PAST + 2))

    project.json("--metrics-dir", str(folder), "status")

    assert 0 <= samples(folder, "materialize_lag_seconds")[()] < 60
    assert samples(folder, "materialize_lag_target_seconds") == {(): 7200}
    assert samples(folder, "materialize_watermark_version") == {(): 0}
    assert samples(folder, "materialize_table_version") == {(): 1}
    assert samples(folder, "materialize_runs_total") == {("ok",): 1}


def test_verify_counts_how_entities_differ(project: Project, folder: Path) -> None:
    environment = {metrics.FOLDER_VARIABLE: str(folder)}
    assert project.run("incremental", env=environment).returncode == 0

    assert project.run("verify", "--full", env=environment).returncode == 0

    assert samples(folder, "materialize_verify_entities_total") == {
        ("equal",): 2,
        **{(problem,): 0 for problem in ("missing", "extra", "stale", "wrong")},
    }


# --- OpenTelemetry -------------------------------------------------------------------------------------------------------


def test_a_run_is_sent_by_otlp_before_the_process_ends_as_what_it_added(project: Project) -> None:
    with receiving() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}

        for _ in range(2):
            ended = project.run("incremental", env=environment)
            assert ended.returncode == 0, ended.stderr

    assert receiver.points("materialize.runs") == {("ok", "default", "spending"): 2}
    assert receiver.points("materialize.rows.read") == {("incremental", "default", "spending"): 3}
    assert receiver.points("materialize.run.duration")["incremental", "default", "spending"] > 0
    for metric in receiver.metrics:
        assert (metric.unit, metric.description) == (METRICS[metric.name].unit, METRICS[metric.name].help)
        if metric.HasField("sum"):
            assert (metric.sum.aggregation_temporality, metric.sum.is_monotonic) == (1, True)  # delta
    (name,) = {
        attribute.value.string_value
        for request in receiver.requests
        for resource in request.resource_metrics
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
    }
    assert name == "materialize"


def test_a_stopped_run_sends_its_metrics_too(project: Project) -> None:
    project.configure(url="redis://127.0.0.1:1/0?timeout=0.5")
    with receiving() as receiver:
        ended = project.run("incremental", env={"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url})

    assert ended.returncode == 1
    assert receiver.points("materialize.runs") == {("UnavailableError", "default", "spending"): 1}


@pytest.mark.parametrize("listening", [True, False], ids=["silent receiver", "no receiver"])
def test_a_receiver_that_does_not_answer_holds_a_process_for_seconds_only(project: Project, *, listening: bool) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if listening:
            deaf.listen()
        started = time.monotonic()

        ended = project.run(
            "incremental",
            env={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:s3cret@127.0.0.1:{deaf.getsockname()[1]}"},
        )

    assert ended.returncode == 0
    assert time.monotonic() - started < 15
    assert "s3cret" not in ended.stderr


def test_the_provider_that_a_process_has_is_used(table: Table, tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from opentelemetry.metrics import set_meter_provider
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from datetime import datetime, timezone
        from materialize import metrics
        from materialize.model import RunReport
        reader = InMemoryMetricReader()
        set_meter_provider(MeterProvider([reader]))
        metrics.finished(RunReport("v", "s", "rebuild", 0, 1, rows_read=7), datetime.now(timezone.utc))
        metrics.flush()
        data = reader.get_metrics_data()
        print({m.name: p.value for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics
               if m.name == "materialize.rows.read" for p in m.data.data_points})
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)

    assert ended.stdout.strip() == "{'materialize.rows.read': 7}"
