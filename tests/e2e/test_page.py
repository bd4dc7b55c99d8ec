"""The freshness page in a real browser: framed by the UI of a real Airflow below a sub-path, whose scheduler made the runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

from tests.airflow.project import Project
from tests.e2e.stack import ROOT, AirflowStack
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, FrameLocator, Page

    from tests import servers

pytestmark = [pytest.mark.e2e, pytest.mark.airflow, pytest.mark.server, pytest.mark.xdist_group("page")]

#: With this variable the pictures of the documentation are taken anew.
PICTURES = "MATERIALIZE_PICTURES"
DOCUMENTED = ("freshness-light", "freshness-phone-dark", "form", "run")
HOURLY, DAILY, FORM = "materialize_hourly", "materialize_daily", "materialize_backfill"
SUB_PATH = "/team/airflow"
PAGE, FRAMED = "/materialize/freshness", "/plugin/materialize-freshness"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 1200}
PASSWORD = "not-a-real-secret"
#: What a feature view may be described as; in the documentation it is another text.
MALICE = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
#: Milliseconds that Airflow's UI may take on a busy machine.
PATIENCE = 60_000


class GuardedStack(AirflowStack):
    """An Airflow below a sub-path, with the plugin and with users who have to sign in."""

    def __init__(self, home: Path, dags: Path, **environment: str) -> None:
        passwords = home / "passwords.json"
        home.mkdir(parents=True)
        passwords.write_text(json.dumps(dict.fromkeys(("admin", "stranger"), PASSWORD)))
        super().__init__(
            home,
            dags,
            AIRFLOW__CORE__PLUGINS_FOLDER=str(ROOT / "plugins"),
            AIRFLOW__CORE__AUTH_MANAGER="tests.airflow.auth_manager.SomeMayNot",
            AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS="False",
            AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS="admin:admin,stranger:viewer",
            AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE=str(passwords),
            **environment,
        )
        self.url += SUB_PATH
        self.environment["AIRFLOW__API__BASE_URL"] = self.url
        self.environment["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] = f"{self.url}/execution/"

    def sign_in(self, user: str = "admin") -> str:
        answer = self.request("POST", "/auth/token", {"username": user, "password": PASSWORD})
        return str(answer["access_token"])

    def remember(self, asset: str, hours: int, extra: dict[str, Any]) -> None:
        """An asset event of some *hours* ago, as a run leaves it."""
        at = datetime.now(timezone.utc) - timedelta(hours=hours)
        with sqlite3.connect(self.home / "airflow.db", timeout=60) as database:
            database.execute(
                "INSERT INTO asset_event (asset_id, extra, source_dag_id, source_run_id, source_map_index, timestamp) "
                "SELECT id, ?, ?, ?, -1, ? FROM asset WHERE name = ?",
                (json.dumps(extra), HOURLY, f"scheduled__{at:%Y-%m-%dT%H}", f"{at:%Y-%m-%d %H:%M:%S.%f}", asset),
            )


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless Chromium, the machine's own."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("NOT TESTED in a browser: no chromium on PATH; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def airflow(
    chromium: Browser, valkey_server: servers.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuardedStack]:
    """One view with a long history in a Valkey known to Airflow's connections only, one in a dead store, one never loaded."""
    folder = tmp_path_factory.mktemp("page")
    valkey_server.client.flushall()
    project = Project(folder / "project")
    stores = project.root / "config" / "online_stores.yaml"
    stores.write_text("default: {connection: features}\n")
    describe(
        project,
        "spending",
        "Spending of a card holder over the last days and weeks",
        "owner: fraud-team\nfreshness: 2h\n",
    )
    describe(project, "risk", "Risk of a merchant" if PICTURES in os.environ else MALICE, "")
    describe(project, "profile", "Profile of a user", "owner: growth-team\nfreshness: 1d\n")
    for commit in range(29):
        project.add("spending", commit, event=11.8, amount=1.0)
    with GuardedStack(folder / "airflow", ROOT / "dags", MATERIALIZE_CONFIG=str(stores.parent)) as stack:
        where = {"connection_id": "features", "conn_type": "redis", "host": "127.0.0.1", "port": valkey_server.port}
        stack.request("POST", "/api/v2/connections", where)
        stack.parsed(HOURLY, DAILY, FORM)
        for hours in range(29, 0, -1):
            stack.remember("default/spending", hours, past_run(hours))
        stack.wait_until(lambda: stack.idle(HOURLY), "no run to be active")
        run = stack.trigger(HOURLY)
        assert stack.finished(HOURLY, run) == "success", stack.logs()
        stack.run_id = run
        stores.write_text(
            f'default: {{connection: features}}\ndead: {{url: "redis://:{PASSWORD}@127.0.0.1:{free_port()}/0"}}\n'
        )
        risk = stores.parent / "feature_views" / "risk.yaml"
        risk.write_text(risk.read_text().replace("[default]", "[dead]"))
        yield stack


def describe(project: Project, view: str, description: str, lines: str) -> None:
    path = project.root / "config" / "feature_views" / f"{view}.yaml"
    path.write_text(path.read_text().replace(f"{view} of a user", json.dumps(description)) + lines)


def past_run(hours: int) -> dict[str, Any]:
    """A plausible run; the figures only have to look like some."""
    rows = 4_000 + (hours * 7_919) % 23_000 + (30_000 if hours % 24 < 9 else 0)
    return {
        "mode": "backfill" if hours == 3 else "incremental",
        "from_version": 28 - hours,
        "to_version": 29 - hours,
        "rows_read": rows * 3 + 17,
        "written": rows,
        "stale": rows // 40,
        "quarantined": 12 if hours == 4 else 0,
        "deleted": 3 if hours % 5 == 0 else 0,
        "seconds": 0.4 + rows / 30_000,
    }


def context(chromium: Browser, airflow: GuardedStack, user: str | None = "admin", **options: Any) -> BrowserContext:
    """A window of somebody who has signed in, or has not."""
    options = {"viewport": DESKTOP} | options
    opened = chromium.new_context(**options)
    opened.set_default_timeout(PATIENCE)
    if user is not None:
        opened.add_cookies([{"name": "_token", "value": airflow.sign_in(user), "url": airflow.url, "httpOnly": True}])
    return opened


def opened(window: BrowserContext, url: str) -> tuple[Page, list[str]]:
    """The page at *url*, and what its browser complains about."""
    page, complaints = window.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(url)
    return page, complaints


def frame(page: Page) -> FrameLocator:
    return page.frame_locator("iframe")


def pictured(page: Page, tmp_path: Path, name: str) -> None:
    """A picture of what is in view; the documentation's own when asked for, else beside the test's other files."""
    folder = ROOT / "docs" / "images" if PICTURES in os.environ and name in DOCUMENTED else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def test_page_is_in_the_navigation_and_its_links_lead_out_of_the_frame(
    chromium: Browser, airflow: GuardedStack, tmp_path: Path
) -> None:
    window = context(chromium, airflow, color_scheme="light")
    page, complaints = opened(window, f"{airflow.url}/")

    page.get_by_role("link", name="Freshness").click()

    frame(page).get_by_role("heading", name="Feature freshness").wait_for()
    assert page.url.startswith(airflow.url + FRAMED)
    pictured(page, tmp_path, "freshness-light")
    # At a full hour the schedule's own run is the newest one.
    newest = frame(page).locator("#spending--default table a").first
    run_id = unquote((newest.get_attribute("href") or "").rpartition("/")[2])
    newest.click()
    page.wait_for_url(re.compile(rf"{re.escape(airflow.url)}/dags/{HOURLY}/runs/"))
    assert run_id in {str(one["dag_run_id"]) for one in airflow.runs(HOURLY)}
    assert unquote(page.url).endswith(f"/runs/{run_id}")
    assert page.locator("iframe").count() == 0, "the run fills the window"
    assert [text for text in complaints if "materialize" in text or "Content" in text] == []
    window.close()


def test_anonymous_gets_401_and_who_may_not_see_the_dags_403(chromium: Browser, airflow: GuardedStack) -> None:
    for user, status, title in ((None, 401, "Not signed in"), ("stranger", 403, "Not for you")):
        window = context(chromium, airflow, user)
        for path in (PAGE, f"{PAGE}.json"):
            page = window.new_page()
            answer = page.goto(airflow.url + path)
            assert answer is not None
            assert answer.status == status
            assert "spending" not in answer.text()
            assert page.title() == (title if path == PAGE else "")
        window.close()


def test_theme_is_the_one_chosen_in_airflow_and_changes_with_it(
    chromium: Browser, airflow: GuardedStack, tmp_path: Path
) -> None:
    window = context(chromium, airflow, color_scheme="dark")
    page, _ = opened(window, airflow.url + FRAMED)
    title = frame(page).get_by_role("heading", name="Feature freshness")
    title.wait_for()

    def lightness() -> int:
        """The mean of the text's colour: dark text on a light page or the other way round."""
        return int(title.evaluate("e => Math.max(...getComputedStyle(e).color.match(/[0-9]+/g).slice(0, 3))"))

    system = lightness()
    # What the theme switch of Airflow's UI leaves in the browser.
    page.evaluate("localStorage.setItem('theme', 'light')")
    page.wait_for_timeout(500)
    light = lightness()
    page.evaluate("localStorage.setItem('theme', 'dark')")
    page.reload()
    title.wait_for()
    pictured(page, tmp_path, "freshness-dark")

    assert (system > 200, light < 60, lightness() > 200) == (True, True, True)
    window.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone_shows_everything_without_scrolling_sideways(
    chromium: Browser, airflow: GuardedStack, tmp_path: Path, theme: str
) -> None:
    window = context(chromium, airflow, viewport=PHONE, color_scheme=theme, is_mobile=True, device_scale_factor=2)
    page, complaints = opened(window, airflow.url + PAGE)
    page.get_by_text("25 more").click()
    page.locator("#spending--default .backfill summary").click()

    wide = page.evaluate("document.documentElement.scrollWidth")
    outside = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".filter(e => !e.closest('thead')).length"
    )

    beside = page.evaluate(
        "[...document.querySelectorAll('tbody tr')].filter(row => row.cells[2].getBoundingClientRect().top"
        " < row.cells[1].getBoundingClientRect().bottom).length"
    )

    assert (wide, outside, beside) == (PHONE["width"], 0, 0)
    assert complaints == []
    page.reload()
    page.locator("#spending--default").evaluate("card => card.scrollIntoView()")
    pictured(page, tmp_path, f"freshness-phone-{theme}")
    framed, _ = opened(window, airflow.url + FRAMED)
    frame(framed).get_by_role("heading", name="Feature freshness").wait_for()
    assert frame(framed).locator("html").evaluate("e => e.scrollWidth <= e.clientWidth")
    window.close()


def test_dead_store_and_hostile_description_are_text_on_a_page_that_works(
    chromium: Browser, airflow: GuardedStack
) -> None:
    window = context(chromium, airflow)
    page, complaints = opened(window, airflow.url + PAGE)

    dead = page.locator("#risk--dead")
    assert dead.locator(".pill").inner_text() == "No answer"
    assert "could not read the watermark of feature view 'risk'" in dead.locator(".problem").inner_text()
    assert PICTURES in os.environ or MALICE in dead.inner_text()
    assert page.locator("#spending--default .pill").inner_text() == "Fresh"
    assert page.title() == "Feature freshness"
    assert PASSWORD not in page.content()
    assert PASSWORD not in (airflow.home / "api-server.log").read_text()
    assert complaints == []
    window.close()


def test_backfill_form_is_filled_in_for_its_view_and_starts_the_dag(
    chromium: Browser, airflow: GuardedStack, tmp_path: Path
) -> None:
    window = context(chromium, airflow)
    page, _ = opened(window, airflow.url + FRAMED)
    card = frame(page).locator("#spending--default")
    card.locator(".backfill summary").click()

    card.get_by_label("From event time").fill("2026-11-01T00:00")
    card.get_by_label("To, not included").fill("2026-11-01T06:00")
    card.get_by_role("button", name="Start for spending in default").click()

    started = card.locator("output a")
    started.wait_for()
    pictured(page, tmp_path, "freshness-backfill")
    run_id = started.inner_text()
    conf = airflow.request("GET", f"/api/v2/dags/{FORM}/dagRuns/{run_id.replace('+', '%2B')}")["conf"]
    assert conf == {
        "views": ["spending"],
        "store": "default",
        "mode": "interval backfill",
        "start": "2026-11-01T00:00:00.000Z",
        "end": "2026-11-01T06:00:00.000Z",
        "dry_run": True,
    }
    assert airflow.finished(FORM, run_id) == "success", airflow.logs()
    started.click()
    page.wait_for_url(re.compile(rf"{re.escape(airflow.url)}/dags/{FORM}/runs/"))
    window.close()


def test_airflows_form_shows_every_field_and_the_run_its_groups(
    chromium: Browser, airflow: GuardedStack, tmp_path: Path
) -> None:
    window = context(chromium, airflow, color_scheme="light")
    page, _ = opened(window, f"{airflow.url}/dags/{FORM}")
    page.get_by_role("button", name=re.compile("^Trigger")).first.click()
    for title in ("Feature views", "Mode", "Start", "End", "Online store", "Dry run", "Pieces in parallel"):
        page.get_by_text(re.compile(f"^{title}")).first.wait_for()
    pictured(page, tmp_path, "form")

    page.goto(f"{airflow.url}/dags/{HOURLY}/runs/{airflow.run_id.replace('+', '%2B')}")
    page.get_by_text("spending__default").first.wait_for()
    page.get_by_text("publish").first.wait_for()
    pictured(page, tmp_path, "run")
    window.close()
