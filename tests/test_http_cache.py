"""`materialize serve --cache`: what is remembered, for how long, who is told of changes, and what `/metrics` says of it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from materialize.server.settings import Settings
from tests import servers
from tests.http_project import EVENT, TOKEN, HttpProject, told
from tests.projects import PAST
from tests.tables import row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.http_project import Served

pytestmark = pytest.mark.server


@pytest.fixture
def project(tmp_path: Path, valkey: servers.Server) -> HttpProject:
    return HttpProject(tmp_path, valkey.url)


def add(project: HttpProject, view: str, line: str) -> None:
    """To the YAML of *view*."""
    path = project.project.config / "feature_views" / f"{view}.yaml"
    path.write_text(path.read_text() + line + "\n")


def read(served: Served, path: str, feature: str) -> Any:
    return told(served.get(f"/v1/features/{path}"))["features"][feature]


def results(served: Served, view: str) -> list[float]:
    """Hits, misses and waits, as they are told."""
    label = f'{{result="%s",store="default",view="{view}"}}'
    return [served.metric("materialize_cache_reads_total" + label % result) for result in ("hit", "miss", "wait")]


def calls(valkey: servers.Server) -> int:
    """Reads of records that the server was asked since the last ``resetstat``."""
    found = valkey.client.info("commandstats")
    return sum(found[name]["calls"] for name in ("cmdstat_get", "cmdstat_mget") if name in found)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_without_the_option_each_read_asks_the_store(project: HttpProject, valkey: servers.Server) -> None:
    add(project, "spending", "cache_ttl: 1h")
    project.put("spending", "a", 1.5, 2, None)
    with project.serving() as served:
        read(served, "spending/a", "amount")
        valkey.client.config_resetstat()
        for _ in range(3):
            read(served, "spending/a", "amount")

        assert calls(valkey) == 3
        assert "materialize_cache" not in served.get("/metrics").text


def test_a_record_is_served_for_its_views_ttl_and_none_of_a_realtime_view(
    project: HttpProject, valkey: servers.Server
) -> None:
    add(project, "shop", "cache_ttl: 1s")
    project.view("now", "user_id", amount="float64")
    add(project, "now", "realtime: true")
    add(project, "spending", "ttl: 36500d")
    project.put("spending", "a", 1.5, 2, None)
    project.put("shop", "a|9", 0.25)
    project.put("now", "a", 0.5)
    with project.serving("--cache", "100", "--cache-ttl", "1h") as served:
        for path, feature in (("spending/a", "amount"), ("shop/a%7C9", "score"), ("now/a", "amount")):
            read(served, path, feature)
        valkey.client.config_resetstat()
        first = told(served.get("/v1/features/spending/a"))
        assert calls(valkey) == 0
        assert results(served, "spending") == [1, 1, 0]

        later = EVENT.replace(hour=1)
        project.put("spending", "a", 2.5, 2, None, event=later)
        project.put("shop", "a|9", 0.75, event=later)
        project.put("now", "a", 1.5, event=later)

        assert read(served, "now/a", "amount") == 1.5
        until(lambda: read(served, "shop/a%7C9", "score") == 0.75)
        second = told(served.get("/v1/features/spending/a"))
        aged = told(served.get("/v1/features/spending/a?max_age=60"))
        assert second["features"] == {"amount": 1.5, "count": "2", "country": None}
        assert second["statuses"] == {"country": "null"}
        assert (second["status"], second["event_timestamp"]) == ("present", EVENT.isoformat())
        assert second["age_seconds"] > first["age_seconds"]
        assert (aged["status"], aged["features"]["amount"]) == ("expired", None)
        assert results(served, "spending") == [3, 1, 0]
        assert served.metric('materialize_cache_entries{store="default",view="spending"}') == 1
        assert 'view="now"' not in served.get("/metrics").text


def test_what_makes_room_and_what_is_absent_is_counted(project: HttpProject) -> None:
    with project.serving("--cache", "2", "--cache-ttl", "1h") as served:
        for key in (1, 2, 3, 3):
            assert told(served.get(f"/v1/features/spending/{key}"))["status"] == "missing"

        assert results(served, "spending") == [1, 3, 0]
        assert served.metric('materialize_cache_evictions_total{reason="full",store="default",view="spending"}') == 1
        assert served.metric('materialize_cache_entries{store="default",view="spending"}') == 2


def test_a_run_is_seen_at_once_where_the_store_tells_what_changes(project: HttpProject, valkey: servers.Server) -> None:
    project.project.configure()
    project.project.table.append(row("a", PAST + 1, 1.5))
    assert project.project.run("incremental", "spending").returncode == 0
    with project.serving("--cache", "100", "--cache-ttl", "1h", "--tracking") as served:
        until(lambda: read(served, "spending/a", "amount") == 1.5 and results(served, "spending")[0] > 0)
        valkey.client.config_resetstat()
        read(served, "spending/a", "amount")
        assert calls(valkey) == 0

        project.project.table.append(row("a", PAST + 2, 2.5))
        assert project.project.run("incremental", "spending").returncode == 0

        until(lambda: read(served, "spending/a", "amount") == 2.5)
        assert served.metric("materialize_cache_evictions_total") >= 1


def test_readiness_asks_the_store_and_not_the_cache(tmp_path: Path) -> None:
    with servers.running("valkey") as server:
        project = HttpProject(tmp_path, server.url)
        project.put("spending", "a", 1.5, 2, None)
        with project.serving("--cache", "100", "--cache-ttl", "1h") as served:
            for _ in range(2):
                assert served.get("/readyz").status_code == 200
                assert read(served, "spending/a", "amount") == 1.5
            server.process.kill()
            server.process.wait()

            assert served.get("/readyz").status_code == 503
            assert read(served, "spending/a", "amount") == 1.5  # for as long as its ttl says


def test_several_processes_tell_of_all_their_caches_whichever_is_asked(project: HttpProject) -> None:
    project.put("spending", "a", 1.5, 2, None)
    with (
        project.serving("--workers", "2", "--cache", "100", "--cache-ttl", "1h") as served,
        one_process(served) as text,
    ):
        for _ in range(20):
            read(served, "spending/a", "amount")

        until(lambda: total(text(), "materialize_cache_reads_total") == 20)
        entries = total(text(), "materialize_cache_entries")
        assert entries == total(text(), 'materialize_cache_reads_total{result="miss"')  # one in each that was asked
        assert served.stop()[0] == 0


@contextmanager
def one_process(served: Served) -> Iterator[Callable[[], str]]:
    """The metrics as one of the processes tells them: over one connection."""
    with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield lambda: client.get(f"http://127.0.0.1:{served.port}/metrics").text


def total(text: str, start: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(start))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--cache", "10", "--cache-ttl", "1h", "--tracking", "--replicas"),
            "found reads from replicas, expected none",
        ),
        (("--cache", "10"), "found no feature view with cache_ttl that is not realtime"),
        (("--tracking",), "without --cache"),
        (("--cache-ttl", "1h"), "without --cache"),
    ],
    ids=["replicas", "nothing to cache", "tracking alone", "ttl alone"],
)
def test_a_cache_that_would_be_wrong_or_empty_is_refused_before_anything_listens(
    project: HttpProject, options: Sequence[str], expected: str
) -> None:
    ended = project.project.run("serve", "--workers", "2", *options)

    assert ended.returncode == 1
    assert expected in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_store_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    project = HttpProject(tmp_path, f"sqlite:///{tmp_path}/online.db")

    ended = project.project.run("serve", "--cache", "10", "--cache-ttl", "1h", "--tracking")

    assert ended.returncode == 1
    assert "could not follow changes in sqlite" in " ".join(ended.stderr.split())


def test_settings_are_the_same_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("config", connect=1.5, entries=7, ttl=30.0, tracking=True)
    monkeypatch.setenv("MATERIALIZE_SERVE_SETTINGS", "")
    settings.to_environment()

    assert Settings.from_environment() == settings
    assert settings.cache is not None
    assert (settings.cache.entries, settings.terms.connect) == (7, 1.5)
