"""A project as a user has it: a config folder, a Delta table, a store; and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from tests.tables import T0, Table

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PAST", "Project"]

#: Minutes from the tables' first event time to a day before now: a row at PAST + 1 is what a real run sees as recent.
PAST = (datetime.now(timezone.utc).replace(second=0, microsecond=0) - timedelta(days=1) - T0) / timedelta(minutes=1)
MAIN = "from materialize.cli import main; main()"
#: Root may read and write everything. This gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (PR_CAPBSET_DROP), which holds
#: from the next program on.
DROP = """\
import ctypes, os, sys
for right in (1, 2):
    ctypes.CDLL(None).prctl(24, right, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
"""
VIEW = """\
source: {source}
join_keys: [{keys}]
event_timestamp: event_timestamp
created_timestamp: created
features:
{features}
online_stores: [default]
"""


@dataclass(slots=True)
class Project:
    """One feature view, ``spending``, over ``table``; its config is written by `configure`."""

    folder: Path
    url: str
    table: Table = field(init=False)

    def __post_init__(self) -> None:
        self.table = Table(self.folder / "lake" / "spending")
        self.configure()

    @property
    def config(self) -> Path:
        return self.folder / "config"

    def configure(self, **changes: Any) -> None:
        """Write the YAML files. *changes*: keys, features (name: type), source, extra (more lines), url."""
        (self.config / "feature_views").mkdir(parents=True, exist_ok=True)
        features = changes.get("features", {"amount": "float64", "count": "int64", "country": "string"})
        text = VIEW.format(
            source=changes.get("source", self.table.path),
            keys=changes.get("keys", "user_id"),
            features="\n".join(f"  {name}: {kind}" for name, kind in features.items()),
        )
        (self.config / "feature_views" / "spending.yaml").write_text(text + changes.get("extra", ""))
        (self.config / "online_stores.yaml").write_text(
            f"default: {{url: {json.dumps(changes.get('url', self.url))}}}\n"
        )

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """The command line, in a process that the caller waits for; *as_user*: without root's rights to files."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_CORE")}
        environment |= {"MATERIALIZE_CONFIG": str(self.config), "NO_COLOR": "1"} | options.pop("env", {})
        program = [DROP, MAIN] if options.pop("as_user", False) and os.geteuid() == 0 else [MAIN]
        command = [sys.executable, "-c", *program, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **(pipes | options))  # type: ignore[no-any-return]

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The command line, to its end."""
        with self.start(*arguments, **options) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str) -> list[dict[str, Any]]:
        """What a command that has to succeed prints with ``--json``."""
        ended = self.run(*arguments, "--json")
        assert ended.returncode == 0, ended.stderr
        return [json.loads(line) for line in ended.stdout.splitlines()]
