"""DynamoDB Local on a free loopback port, by ``scripts/dynamodb_local.py`` in a process of its own, ended by its process id."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from tests.processes import end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mypy_boto3_dynamodb import DynamoDBClient

__all__ = ["KEY", "REGION", "SECRET", "DynamoDbLocal", "DynamoDbMissing", "running"]

SCRIPT = Path(__file__).parents[1] / "scripts" / "dynamodb_local.py"
#: Seconds that the server may take to answer.
START_SECONDS = 30.0
#: Any will do, of letters and digits: every account and region sees the same tables.
KEY, SECRET, REGION = "test", "test", "eu-central-1"


class DynamoDbMissing(Exception):
    """DynamoDB Local cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class DynamoDbLocal:
    """A running server, a boto3 client of it, what it has printed, and its process: that of the JVM itself."""

    port: int
    client: DynamoDBClient
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def drop_tables(self) -> None:
        """Delete every table."""
        for page in self.client.get_paginator("list_tables").paginate():
            for table in page["TableNames"]:
                self.client.delete_table(TableName=table)

    def items(self, table: str) -> list[dict[str, Any]]:
        """All items of *table*, each attribute as ``{type: value}``."""
        pages = self.client.get_paginator("scan").paginate(TableName=table, ConsistentRead=True)
        return [dict(item) for page in pages for item in page["Items"]]


@contextmanager
def running() -> Iterator[DynamoDbLocal]:
    """A fresh server, which also ends with this process, however that ends. Raises DynamoDbMissing where it cannot be had."""
    fetched = subprocess.run([sys.executable, SCRIPT, "--fetch"], capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        raise DynamoDbMissing(fetched.stderr.strip())
    with tempfile.TemporaryDirectory(prefix="test-dynamodb-") as folder:
        log = Path(folder) / "log"
        process = _started(Path(folder), log)
        try:
            port = _port(process, log)
            client = boto3.client(
                "dynamodb",
                endpoint_url=f"http://127.0.0.1:{port}",
                aws_access_key_id=KEY,
                aws_secret_access_key=SECRET,
                region_name=REGION,
                config=Config(retries={"total_max_attempts": 1}),
            )
            try:
                yield DynamoDbLocal(port, client, log, process)
            finally:
                client.close()
        finally:
            end(process)


def _started(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """The JVM that takes a port itself, so that there is no race for it; Ctrl-C of the tests does not reach it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, SCRIPT, "--port", "0", "--end-with-stdin"],
            cwd=folder,
            env=os.environ | {"TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if told := re.search(r"http://127\.0\.0\.1:(\d+)\s", log.read_text()):
            return int(told[1])
        time.sleep(0.02)
    raise AssertionError(f"could not start DynamoDB Local: {log.read_text()[-2000:]}")
