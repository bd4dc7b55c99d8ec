"""One real server with files of its own, which a test stops with SIGKILL and starts again, also from older files."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import redis

from tests import servers

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Restartable"]


class Restartable:
    """One server on one port for all its lives, with files that it can be restarted from."""

    def __init__(self, kind: str, folder: Path, *options: str) -> None:
        program = servers.binary(kind)
        assert program is not None, f"no {kind} server on this machine"
        self.program, self.folder, self.options = program, folder, options
        self.port, self.files = servers.free_port(), 0
        self.client = redis.Redis(port=self.port, protocol=2)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [
            self.program,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(self.folder),
        ]
        with (self.folder / "log").open("wb") as output:
            self.process = subprocess.Popen([*command, *self.options], cwd=self.folder, stdout=output, stderr=output)
        assert servers._ready(self.process, self.client)

    def stop(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def saved(self) -> Path:
        """A file of all that the server has now."""
        self.client.save()
        self.files += 1
        copy = self.folder / f"saved-{self.files}.rdb"
        shutil.copy(self.folder / "dump.rdb", copy)
        return copy

    def restart(self, file: Path | None) -> None:
        self.stop()
        (self.folder / "dump.rdb").unlink(missing_ok=True)
        if file is not None:
            shutil.copy(file, self.folder / "dump.rdb")
        self.start()

    def kill_and_start(self) -> None:
        """SIGKILL, and a start with whatever files it left."""
        self.stop()
        self.start()
