"""The freshness page: real Delta tables, real stores, real runs on a real metadata database, asked for as a browser does."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.models.asset import AssetEvent, AssetModel
from airflow.utils.session import create_session
from sqlalchemy import delete, event

from materialize import watermark
from materialize.airflow.page import cards as page_cards, history, render
from materialize.airflow.page.board import Reader
from materialize.config import load
from materialize.model import Watermark
from materialize.online import open_store
from tests.airflow.project import START, Project
from tests.airflow.runs import BUNDLE, load_dags, run_dag

with warnings.catch_warnings():
    # What Airflow's API server needs warns about its own imports.
    warnings.simplefilter("ignore")
    from airflow.api_fastapi.app import get_auth_manager, init_auth_manager, purge_cached_app
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from materialize.airflow.page.app import create_app
    from tests.airflow.auth_manager import DAILY, STRANGER

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.usefixtures("metadata_database"), pytest.mark.xdist_group("page")]

ROOT = Path(__file__).parents[2]
HOURLY, FORM = "materialize_hourly", "materialize_backfill"
MALICE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.fixture(autouse=True)
def auth_manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Users who may see everything, nothing, and the daily DAG only."""
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", "tests.airflow.auth_manager.SomeMayNot")
    monkeypatch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE", str(tmp_path / "passwords.json"))
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "not-a-real-secret" * 4)
    purge_cached_app()
    init_auth_manager()
    yield
    purge_cached_app()


@pytest.fixture(autouse=True)
def no_events() -> None:
    """Other tests run the same views."""
    with create_session() as session:
        session.execute(delete(AssetEvent))


def browser(project: Project, user: str | None = "admin", role: str = "ADMIN", *, root: str = "") -> TestClient:
    """A client of an Airflow that has mounted the page; anonymous without *user*."""
    app = FastAPI(root_path=root)
    app.mount("/materialize", create_app(project.root / "config"))
    cookies = {}
    if user is not None:
        cookies["_token"] = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username=user, role=role, teams=[]))
    return TestClient(app, cookies=cookies, raise_server_exceptions=False)


def cards(client: TestClient) -> dict[str, dict[str, Any]]:
    answer = client.get("/materialize/freshness.json")
    assert answer.status_code == 200, answer.text
    assert client.get("/materialize/freshness").status_code == 200
    return {f"{card['view']} {card['store']}": card for card in answer.json()["views"]}


def emit(name: str, extra: Any, *, count: int = 1, dag_id: str | None = HOURLY, run_id: str = "manual__1") -> None:
    """Asset events as Airflow writes them, an hour apart, the newest now."""
    now = datetime.now(timezone.utc)
    with create_session() as session:
        asset = session.query(AssetModel).filter_by(name=name).one_or_none()
        if asset is None:
            asset = AssetModel(name=name, uri=f"materialize://{name}", group="asset")
            session.add(asset)
            session.flush()
        for hours in range(count):
            moment = now - timedelta(hours=hours)
            session.add(
                AssetEvent(asset_id=asset.id, extra=extra, timestamp=moment, source_dag_id=dag_id, source_run_id=run_id)
            )


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield int(listening.getsockname()[1])


def view_file(project: Project, name: str) -> Path:
    return project.root / "config" / "feature_views" / f"{name}.yaml"


def extend(project: Project, name: str, lines: str) -> None:
    with view_file(project, name).open("a") as file:
        file.write(lines)


# What it shows ---------------------------------------------------------------------------------------------------------


def test_every_view_and_store_has_its_watermark_event_time_lag_and_runs(project: Project) -> None:
    project.add("spending", 2, event=3.5, amount=2.0)
    extend(project, "spending", "freshness: 2h\nowner: fraud-team\n")
    run = run_dag(HOURLY)
    assert run.state == "success"
    client = browser(project)

    found = cards(client)

    assert list(found) == ["profile default", "risk default", "spending default"]
    card = found["spending default"]
    report = run.values["spending__default.commit"]
    assert (card["label"], card["watermark_version"], card["table_version"]) == ("Fresh", 1, 1)
    assert card["event"] == (START + timedelta(hours=3.5)).isoformat()
    assert (card["waiting"], card["target"], card["owner"]) == (None, 7200.0, "fraud-team")
    assert card["run_id"] == f"{HOURLY}/{run.run_id}"
    assert card["run_path"] == f"dags/{HOURLY}/runs/{run.run_id}"
    (told,) = card["runs"]
    names = ("mode", "from_version", "to_version", "rows_read", "written", "stale", "quarantined", "deleted", "seconds")
    assert {name: told[name] for name in names} == {name: report[name] for name in names}
    html = client.get("/materialize/freshness").text
    assert f'<a href="/dags/{HOURLY}/runs/{run.run_id}">' in html
    assert html.count('<svg class="chart"') == 2
    assert "target 2 h" in html


def test_lag_counts_from_the_oldest_commit_that_waits(project: Project) -> None:
    run_dag(HOURLY)
    extend(project, "spending", "freshness: 1s\n")
    extend(project, "risk", "freshness: 1d\n")
    for view in ("spending", "risk", "risk"):
        project.add(view, 2, event=1, amount=1.0)
    time.sleep(1.1)

    found = cards(browser(project))

    assert (found["spending default"]["label"], found["spending default"]["tone"]) == ("Late", "bad")
    assert (found["risk default"]["label"], found["risk default"]["tone"]) == ("On time", "good")
    assert 1.0 < found["spending default"]["waiting"] < 60
    assert list(found) == ["spending default", "profile default", "risk default"], "what is wrong comes first"
    html = browser(project).get("/materialize/freshness").text
    assert "1 behind the table's 1" in html
    assert "2 behind the table's 2" in html


def test_views_without_target_run_or_watermark_are_states_of_their_own(project: Project) -> None:
    run_dag(HOURLY)
    project.add("risk", 2, event=1, amount=1.0)
    with open_store(load(project.root / "config").online_store("default")) as online:
        started = Watermark(1, "its-id", None, "[]", "[]", "cli-1")
        watermark.move(online, "spending", watermark.read_text(online, "spending"), started)

    found = cards(browser(project))

    assert {name: (card["label"], card["tone"]) for name, card in found.items()} == {
        "profile default": ("Never loaded", "wait"),
        "risk default": ("Behind", "wait"),
        "spending default": ("Snapshot unfinished", "wait"),
    }
    assert found["profile default"]["runs"] == []


def test_watermark_of_a_table_that_was_replaced_is_not_the_newest(project: Project) -> None:
    run_dag(HOURLY)
    shutil.rmtree(project.root / "risk")
    project.add("risk", 1, event=1, amount=1.0)

    client = browser(project)

    assert cards(client)["risk default"]["label"] == "Behind"
    assert "of a table that was replaced since" in client.get("/materialize/freshness").text


@pytest.mark.parametrize(
    ("run_id", "path"),
    [
        (
            f"{HOURLY}/scheduled__2026-01-31T00:00:00+00:00",
            f"dags/{HOURLY}/runs/scheduled__2026-01-31T00%3A00%3A00%2B00%3A00",
        ),
        (f"{HOURLY}/manual__1/load", f"dags/{HOURLY}/runs/manual__1"),
        ("somebody_elses/manual__1", None),
        ("cli-20260131", None),
        (HOURLY, None),
    ],
)
def test_watermark_leads_to_its_run_where_that_was_one_of_airflow(run_id: str, path: str | None) -> None:
    assert page_cards.path_of(run_id, {HOURLY}) == path


def test_wrong_configuration_is_told_in_its_own_words(project: Project) -> None:
    view_file(project, "spending").write_text("source: [")

    client = browser(project)
    answer = client.get("/materialize/freshness.json").json()

    assert "spending.yaml: 1 problem" in answer["problem"]
    assert answer["views"] == []
    assert "The configuration cannot be read" in client.get("/materialize/freshness").text
    assert browser(project, STRANGER).get("/materialize/freshness").status_code == 403


def test_newest_thirty_events_are_shown_and_drawn(project: Project) -> None:
    emit("default/spending", {"mode": "incremental", "to_version": 7, "written": 5, "seconds": 0.5}, count=40)

    client = browser(project)
    runs = cards(client)["spending default"]["runs"]

    assert len(runs) == 30
    assert [run["at"] for run in runs] == sorted((run["at"] for run in runs), reverse=True)
    html = client.get("/materialize/freshness").text
    assert html.count('<rect x="') == 30
    assert "25 more" in html


def test_comparison_with_the_table_is_told_once_there_was_one(project: Project) -> None:
    before = browser(project).get("/materialize/freshness").text
    emit("default/spending/verified", {"compare": "sample", "version": 3, "compared": 900, "stale": 2, "repaired": 2})
    emit("default/risk/verified", {"compare": "full", "version": 3, "compared": 1200})

    client = browser(project)
    found, html = cards(client), client.get("/materialize/freshness").text

    assert "Verified" not in before
    assert found["spending default"]["verified"]["stale"] == 2
    assert found["profile default"]["verified"] is None
    assert "1,200 compared" in html
    assert "all equal" in html
    assert "2 differ" in html


def test_whatever_stands_in_an_event_or_a_description_is_text_or_left_out(project: Project) -> None:
    view_file(project, "risk").write_text(
        view_file(project, "risk").read_text().replace("risk of a user", json.dumps(MALICE))
    )
    emit("default/spending", {"mode": MALICE, "written": "many", "rows_read": -1, "seconds": True, "to_version": 1e300})
    emit("default/spending", [MALICE], run_id=MALICE)
    emit("default/spending", {}, dag_id=None)

    client = browser(project)
    html, runs = client.get("/materialize/freshness").text, cards(client)["spending default"]["runs"]

    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "<img" not in html
    assert {run["written"] for run in runs} == {0}
    assert {run["rows_read"] for run in runs} == {0}


# Who may see it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["freshness", "freshness.json"])
def test_anonymous_is_401_and_a_user_who_may_not_see_the_dags_is_403(project: Project, path: str) -> None:
    anonymous = browser(project, None).get(f"/materialize/{path}")
    stranger = browser(project, STRANGER).get(f"/materialize/{path}")
    forged = TestClient(browser(project).app, cookies={"_token": "x.y.z"}).get(f"/materialize/{path}")

    token = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username="viewer", role="VIEWER", teams=[]))
    bearer = TestClient(browser(project).app, headers={"authorization": f"Bearer {token}"}).get(f"/materialize/{path}")

    assert (anonymous.status_code, stranger.status_code, forged.status_code) == (401, 403, 403)
    assert bearer.status_code == 200
    for answer in (anonymous, stranger, forged):
        assert "spending" not in answer.text
        assert "Traceback" not in answer.text
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["content-type"].startswith("application/json" if "." in path else "text/html")


def test_user_sees_the_views_and_runs_of_the_dags_that_the_user_may_see(project: Project) -> None:
    emit("default/profile", {"written": 1}, dag_id="materialize_daily")
    emit("default/profile", {"written": 2}, dag_id="somebody_elses")

    daily, everything = browser(project, DAILY, "VIEWER"), browser(project, "viewer", "VIEWER")

    assert list(cards(daily)) == ["profile default"]
    assert [run["written"] for run in cards(daily)["profile default"]["runs"]] == [1]
    assert sorted(run["written"] for run in cards(everything)["profile default"]["runs"]) == [1, 2]
    view_file(project, "profile").unlink()
    assert browser(project, DAILY, "VIEWER").get("/materialize/freshness").status_code == 403


def test_form_is_there_for_users_who_may_start_it(project: Project) -> None:
    load_dags_into_the_database()

    admin, viewer = (
        browser(project, "admin").get("/materialize/freshness").text,
        browser(project, "viewer", "VIEWER").get("/materialize/freshness").text,
    )

    assert f'<form data-view="risk" data-store="default" data-runs="/api/v2/dags/{FORM}/dagRuns"' in admin
    assert "<form" not in viewer
    assert f'<a href="/dags/{FORM}">' in viewer


def test_links_begin_at_the_base_of_airflow(project: Project) -> None:
    load_dags_into_the_database()
    emit("default/spending", {"written": 1})

    html = browser(project, root="/team/airflow").get("/team/airflow/materialize/freshness").text

    links = set(re.findall(r'(?:href|data-runs|data-ui)="([^"]+)"', html)) - {"freshness", "freshness.json", "data:,"}
    assert len(links) > 4
    assert all(link.startswith("/team/airflow/") for link in links), links


def test_unforeseen_error_is_a_number_for_the_log_and_no_traceback(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    app.mount("/materialize", create_app(None))  # type: ignore[arg-type]
    client = TestClient(app, cookies=browser(project).cookies, raise_server_exceptions=False)

    answer = client.get("/materialize/freshness")

    assert answer.status_code == 500
    (number,) = re.findall(r"look there for ([0-9a-f]{12})", answer.text)
    assert f"request {number} of the freshness page failed" in caplog.text
    assert "TypeError" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


# What it costs, and what a dead store does ---------------------------------------------------------------------------------


def test_dead_store_is_one_sentence_without_its_password(project: Project) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    project.set_stores(
        default=f"sqlite:///{project.root}/online.db", gone=f"redis://someone:not-a-real-secret@127.0.0.1:{port}/0"
    )
    project.set_view("risk", store="default, gone")

    client = browser(project)
    found, html = cards(client), client.get("/materialize/freshness").text

    assert found["risk gone"]["label"] == "No answer"
    assert "could not read the watermark of feature view 'risk'" in found["risk gone"]["problem"]
    assert found["risk default"]["problem"] == ""
    assert "not-a-real-secret" not in html + json.dumps(found)


def test_store_that_hangs_costs_the_limit_and_never_more_threads(project: Project) -> None:
    with silent_server() as port:
        project.set_stores(default=f"sqlite:///{project.root}/online.db", hung=f"redis://127.0.0.1:{port}/0")
        for name in ("spending", "risk", "profile"):
            project.set_view(name, store="default, hung")
        reader = Reader(project.root / "config", create_session, keep=0.0, limit=1.0)

        started = time.monotonic()
        boards = [reader.board() for _ in range(3)]
        took = time.monotonic() - started
        hanging = [thread for thread, _ in reader.asking["hung"] if thread.is_alive()]

    assert took < 6.0
    assert len(hanging) == 3, "one for each view, however often it was asked for"
    problems = {(one.view.name, one.store): one.problem for one in boards[-1].standings}
    assert all(("no answer" in problem) == (store == "hung") for (_, store), problem in problems.items()), problems


def test_many_requests_at_once_read_once_and_a_slow_read_delays_only_the_first(project: Project) -> None:
    reads, now = [], [0.0]

    @contextmanager
    def counted() -> Iterator[Any]:
        reads.append(1)
        time.sleep(0.3)
        with create_session() as session:
            yield session

    reader = Reader(project.root / "config", counted, keep=10.0, clock=lambda: now[0])

    first = together(reader, 8)
    now[0] = 9.9
    again = together(reader, 1)
    now[0] = 10.1
    later = together(reader, 8)

    assert len(reads) == 2
    assert len({id(board) for board in first + again}) == 1
    assert len({id(board) for board in later}) == 2, "those that came while one read got the board before"


def together(reader: Reader, requests: int) -> list[Any]:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(reader.board())) for _ in range(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_page_reads_the_metadata_database_by_its_indexes_and_writes_nothing(project: Project) -> None:
    for view in ("spending", "risk", "profile"):
        emit(f"default/{view}", {"written": 1}, count=3)
    statements: list[tuple[str, Any]] = []

    with create_session() as session:
        engine = session.get_bind()

        def remember(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
            statements.append((statement, parameters))

        event.listen(engine, "before_cursor_execute", remember)
        try:
            found = history.read([(view, "default") for view in ("spending", "risk", "profile")], session)
        finally:
            event.remove(engine, "before_cursor_execute", remember)
        plans = [
            row[-1]
            for statement, parameters in statements
            for row in session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]

    assert [len(one.runs) for one in found.values()] == [3, 3, 3]
    assert len(statements) == 2, "one for the assets, one for all events"
    assert all(statement.startswith("SELECT") for statement, _ in statements)
    searches = [plan for plan in plans if re.match(r"(SEARCH|SCAN) asset", plan)]
    assert {plan.partition(" (")[0] for plan in searches} == {
        "SEARCH asset USING COVERING INDEX idx_asset_name_uri_unique",
        "SEARCH asset_event USING INDEX idx_asset_id_timestamp",
    }


def test_importing_the_plugin_loads_nothing_and_parsing_loads_no_page() -> None:
    program = """
import sys
import airflow.sdk, airflow.plugins_manager
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import materialize_plugin
print(sorted(set(sys.modules) - before))
import materialize.airflow.dags
print([name for name in sys.modules if name.startswith("materialize.airflow.page")])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(ROOT / "plugins")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    assert done.stdout.splitlines()[-2:] == ["['materialize_plugin']", "[]"], done.stderr


# Small parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.04, "0.0 s"), (3.25, "3.2 s"), (9, "9 s"), (59, "59 s"), (60, "1 min"), (3599.9, "1 h"), (90_061, "1 d 1 h")],
)
def test_durations_have_their_two_largest_units(seconds: float, told: str) -> None:
    assert render.duration(seconds) == told
    assert render.duration(timedelta(seconds=seconds)) == told


def test_bars_are_in_proportion_the_newest_last_and_never_invisible() -> None:
    moment = datetime(2026, 1, 1, tzinfo=timezone.utc)
    newest, older = (
        history.Run(moment, "incremental", 1, 2, 0, written, 0, 0, 0, 1.0, None, None) for written in (0, 100)
    )

    first, last = render.bars([newest, older])

    assert (first["rows"], first["height"], last["rows"], last["height"]) == (100, 44.0, 0, 2.0)
    assert first["x"] < last["x"]
    assert render.bars([newest])[0]["height"] == 2.0


def load_dags_into_the_database() -> None:
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.dagbag import sync_bag_to_db

    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(load_dags(), BUNDLE, None)
