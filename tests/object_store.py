"""A real server that speaks S3, on a free loopback port: moto in a process of its own, ended by its process id."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.processes import end
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BUCKET", "ObjectStore", "running"]

BUCKET = "lake"
#: Seconds that the server may take to answer, and to end after SIGTERM; starts tried, as in `servers`.
START_SECONDS, STARTS = 30.0, 3
KEY, SECRET, REGION = "test-key", "test-secret", "us-east-1"


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A running server with the bucket BUCKET, and a boto3 client of it. ``log``: a line per request that it answered."""

    port: int
    client: Any
    log: Path

    @property
    def options(self) -> dict[str, str]:
        """What deltalake and polars need. A commit is a conditional put, so that of two writers one has to try again."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_CONDITIONAL_PUT": "etag",
        }

    def refused(self, name: str) -> int:
        """How many puts of objects whose name has *name* in it were refused, because the object was there."""
        lines = self.log.read_text().splitlines()
        return sum("PUT" in line and name in line and '" 412 ' in line for line in lines)


@contextmanager
def running() -> Iterator[ObjectStore]:
    """A fresh server."""
    with tempfile.TemporaryDirectory(prefix="test-object-store-") as folder:
        process, store = _started(Path(folder))
        try:
            yield store
        finally:
            store.client.close()
            end(process)


def _started(folder: Path) -> tuple[subprocess.Popen[bytes], ObjectStore]:
    log = folder / "log"
    for _ in range(STARTS):
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=REGION,
            config=Config(retries={"total_max_attempts": 1}),
        )
        if _ready(process, client):
            return process, ObjectStore(port, client, log)
        client.close()
        end(process)
    raise AssertionError(f"could not start moto: {log.read_text()[-2000:]}")


def _ready(process: subprocess.Popen[bytes], client: Any) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(EndpointConnectionError, ClientError):
            client.create_bucket(Bucket=BUCKET)
            return True
        time.sleep(0.05)
    return False
