"""The freshness page: real Delta tables, real stores, real runs on a real metadata database, asked for as a browser does."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.models.asset import AssetEvent, AssetModel
from airflow.utils.session import create_session
from sqlalchemy import delete, event

from materialize import watermark
from materialize.airflow.page import history, render
from materialize.airflow.page.board import Reader
from materialize.config import load
from materialize.model import Watermark, from_us, to_us
from materialize.online import open_store
from tests.airflow.project import START, Project
from tests.airflow.runs import run_dag

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

    from tests import servers

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
                AssetEvent(
                    asset_id=asset.id, extra=extra, timestamp=moment, source_dag_id=dag_id, source_run_id=run_id
                )
            )


def test_smoke(project: Project) -> None:
    run = run_dag(HOURLY)
    assert run.state == "success"
    client = browser(project)
    found = cards(client)
    print(json.dumps(found, indent=1)[:3000])
    Path("/tmp/page.html").write_text(client.get("/materialize/freshness").text)
