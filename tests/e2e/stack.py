"""A real Airflow on loopback ports for one test: API server, scheduler with its LocalExecutor, dag processor, SQLite, a triggerer where wanted."""

from __future__ import annotations

import contextlib
import http
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import retry, retry_if_exception, stop_after_attempt, wait_fixed

from tests.servers import free_port

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["AirflowStack"]

ROOT = Path(__file__).parents[2]
#: Seconds that the slowest step (a cold start on two busy cores) may take.
PATIENCE = 120.0
#: The processes of every stack, with their arguments.
COMMANDS: dict[str, tuple[str, ...]] = {"api-server": (), "scheduler": ("--skip-serve-logs",), "dag-processor": ()}
#: The states of a run that do not change any more.
ENDED = ("success", "failed")
#: Times that a request is sent when the answer is 500.
TRIES = 5
#: Seconds that a process gets to end by itself.
GRACE = 10.0


def gave_up(error: BaseException) -> bool:
    """Whether Airflow did nothing: SQLite lets one write at a time, and on a busy machine Airflow gives up waiting."""
    return isinstance(error, urllib.error.HTTPError) and error.code == http.HTTPStatus.INTERNAL_SERVER_ERROR


class AirflowStack:
    """Started on entry; on exit every process that it started is ended, whatever happened."""

    def __init__(self, home: Path, dags: Path, *, triggerer: bool = False, **environment: str) -> None:
        self.home = home
        self.commands = COMMANDS | ({"triggerer": ("--skip-serve-logs",)} if triggerer else {})
        self.url = f"http://127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "2",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": self.url.rpartition(":")[2],
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(32),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(64),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            **environment,
        }

    def __enter__(self) -> Self:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self.airflow("db", "migrate").wait(PATIENCE)
            for name in self.commands:
                self.start(name)
            self.wait_until(self.healthy, "Airflow to be healthy")
            self.token = self.sign_in()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def airflow(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start an airflow command in a process group of its own, with its output in ``<home>/<command>.log``."""
        with (self.home / f"{arguments[0]}.log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "airflow", *arguments],
                env=self.environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self, name: str) -> None:
        self.processes[name] = self.airflow(name, *self.commands[name])

    def kill(self, name: str) -> None:
        """SIGKILL one of the processes and its children."""
        process = self.processes.pop(name)
        signal_group(process, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End the processes started here and their children, which are in the same groups."""
        for process in self.processes.values():
            signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            signal_group(process, signal.SIGKILL)
            process.wait()

    def sign_in(self) -> str:
        """The token of a user who may do everything."""
        return str(self.request("GET", "/auth/token")["access_token"])

    def healthy(self) -> bool:
        try:
            health = self.request("GET", "/api/v2/monitor/health")
        except OSError:
            return False
        parts = ["metadatabase", "scheduler", "dag_processor", *({"triggerer"} & set(self.commands))]
        return all(health[part]["status"] == "healthy" for part in parts)

    @retry(retry=retry_if_exception(gave_up), stop=stop_after_attempt(TRIES), wait=wait_fixed(1), reraise=True)
    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the REST API. Raises urllib.error.HTTPError for an answer of 400 and above."""
        request = urllib.request.Request(
            self.url + path, method=method, data=json.dumps(body).encode() if body else None
        )
        request.add_header("content-type", "application/json")
        if hasattr(self, "token"):
            request.add_header("authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            error.close()  # the retry keeps it for a while, and its connection with it
            raise

    def trigger(self, dag_id: str, **fields: Any) -> str:
        """Start a run as the button in the UI does. Returns its id."""
        run = self.request("POST", f"/api/v2/dags/{dag_id}/dagRuns", {"logical_date": None, **fields})
        return str(run["dag_run_id"])

    def finished(self, dag_id: str, run_id: str) -> str:
        """Wait for the end of a run. Returns its state."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}"
        self.wait_until(lambda: self.request("GET", path)["state"] in ENDED, f"{dag_id} {run_id} to end")
        return str(self.request("GET", path)["state"])

    def tasks(self, dag_id: str, run_id: str) -> dict[str, str]:
        """The state of each task of a run; mapped tasks as ``task[map index]``."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances"
        return {
            one["task_id"] if one["map_index"] < 0 else f"{one['task_id']}[{one['map_index']}]": one["state"]
            for one in self.request("GET", path)["task_instances"]
        }

    def parsed(self, *dag_ids: str) -> None:
        """Wait until these DAGs are known; fails at once when a DAG file has an import error."""

        def known() -> bool:
            errors = self.request("GET", "/api/v2/importErrors")["import_errors"]
            assert not errors, errors[0]["stack_trace"]
            return set(dag_ids) <= {dag["dag_id"] for dag in self.request("GET", "/api/v2/dags")["dags"]}

        self.wait_until(known, f"{', '.join(dag_ids)} to be parsed")

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        return list(self.request("GET", f"/api/v2/dags/{dag_id}/dagRuns?limit=100")["dag_runs"])

    def ended(self, dag_id: str, run_type: str) -> list[dict[str, Any]]:
        """The runs of a type that have come to their end."""
        return [run for run in self.runs(dag_id) if run["run_type"] == run_type and run["state"] in ENDED]

    def idle(self, dag_id: str) -> bool:
        return all(run["state"] in ENDED for run in self.runs(dag_id))

    def task_log(self, dag_id: str, run_id: str, task_id: str) -> str:
        """What a task logged in its first try."""
        return json.dumps(self.task_lines(dag_id, run_id, task_id))

    def task_lines(self, dag_id: str, run_id: str, task_id: str) -> list[dict[str, Any]]:
        """The same, line by line, with the fields of each, as the UI has them."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances/{task_id}/logs/1"
        return list(self.request("GET", path)["content"])

    def returned(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """The return value of a task."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances/{task_id}/xcomEntries/return_value"
        value = self.request("GET", path + "?deserialize=true")["value"]
        return json.loads(value) if isinstance(value, str) else value

    def wait_until(self, condition: Any, what: str) -> None:
        """Poll until *condition* holds; fails when a process has died or patience is at its end."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise AssertionError(f"waited for {what}; dead: {dead}\n{self.logs()}")
            time.sleep(0.3)

    def logs(self) -> str:
        """The end of every log, for the message of a failed test."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.home.glob("*.log")))


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the process group that *process*, started with a session of its own, leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
