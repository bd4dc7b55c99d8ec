"""Apache Spark with Delta Lake in one process of its own: a statement of SQL in, rows out, in Python's types."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Self

__all__ = ["SparkError", "SparkMissing", "SparkSession", "literal"]

HERE = Path(__file__).parent
#: Seconds that fetching the jars may take, one statement, and a session that was told to end.
FETCH_SECONDS, STATEMENT_SECONDS, END_SECONDS = 900.0, 180.0, 20.0
OLDEST_JAVA = 17
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
#: What Spark asks of Java 17.
OPENED = (
    *(f"java.base/java.{name}" for name in ("lang", "lang.invoke", "lang.reflect", "io", "net", "nio", "util")),
    *(f"java.base/java.util.{name}" for name in ("concurrent", "concurrent.atomic")),
    *(f"java.base/{name}" for name in ("jdk.internal.ref", "sun.nio.ch", "sun.nio.cs", "sun.security.action")),
    "java.base/sun.util.calendar",
    "java.security.jgss/sun.security.krb5",
)
#: A JVM for a minute of small statements: one compiler, but room for all that it compiles.
JVM = (
    *("-Xms512m", "-Xmx1500m", "-XX:+UseSerialGC", "-XX:MetaspaceSize=384m", "-XX:-UsePerfData", "-Duser.timezone=UTC"),
    *("-XX:TieredStopAtLevel=1", "-XX:ReservedCodeCacheSize=256m"),
)
#: The session: Delta's extension, UTC, and nothing that only pays with many rows.
SETTINGS = {
    "spark.master": "local[2]",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.log.level": "WARN",
    "spark.ui.enabled": "false",
    "spark.default.parallelism": "2",
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.datetime.java8API.enabled": "true",
    "spark.sql.shuffle.partitions": "1",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "2",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.databricks.delta.snapshotCache.storageLevel": "MEMORY_ONLY",
    "spark.databricks.delta.retentionDurationCheck.enabled": "false",
    "spark.databricks.delta.vacuum.parallelDelete.enabled": "false",
}


class SparkMissing(Exception):
    """Spark cannot run here; the message says why."""


class SparkError(Exception):
    """A statement failed in Spark."""


def class_path() -> str:
    """The jars of ``pom.xml`` and all that they need, fetched once per user and version of the file."""
    for program in ("java", "javac", "mvn"):
        if shutil.which(program) is None:
            raise SparkMissing(f"no {program} on PATH")
    told = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', told)
    if version is None or int(version[1]) < OLDEST_JAVA:
        raise SparkMissing(f"expected Java {OLDEST_JAVA} or newer, found {told.strip()}")
    pom = HERE / "pom.xml"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "materialize-spark"
    folder = root / hashlib.sha256(pom.read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "class_path"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.is_file() or not all(Path(jar).is_file() for jar in found.read_text().split(os.pathsep)):
            fresh = folder / "class_path.new"
            command = ["mvn", "--batch-mode", "--quiet", "--file", str(pom), "dependency:build-classpath"]
            command += ["-DincludeScope=runtime", f"-Dmdep.outputFile={fresh}"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise SparkMissing(f"Maven did not fetch the jars within {FETCH_SECONDS:.0f} s") from None
            if done.returncode != 0:
                raise SparkMissing(f"Maven could not fetch the jars: {(done.stdout + done.stderr).strip()[-500:]}")
            fresh.replace(found)
    return found.read_text().strip()


@dataclass(slots=True)
class SparkSession:
    """A session; as a context manager it starts on entry and ends on exit. Its temporary files and its ``log`` go to *folder*.

    ``jvm`` and ``settings`` are for small statements by default.
    """

    folder: Path
    jvm: Sequence[str] = JVM
    settings: Mapping[str, str] = field(default_factory=SETTINGS.copy)
    process: subprocess.Popen[str] | None = None
    version: str = ""

    @property
    def log(self) -> Path:
        return self.folder / "spark.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        jars = class_path()
        settings = {
            **self.settings,
            "spark.sql.warehouse.dir": self.folder.as_uri(),
            "spark.local.dir": str(self.folder),
        }
        command = ["java", *self.jvm, f"-Djava.io.tmpdir={self.folder}"]
        command += [f"--add-opens={package}=ALL-UNNAMED" for package in OPENED]
        command += ["-cp", jars, str(HERE / "Runner.java"), *(f"{name}={value}" for name, value in settings.items())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            self.version = self._answer()["version"]
        except BaseException:
            self.end()
            raise

    def sql(self, statement: str) -> list[dict[str, Any]]:
        """Run one statement and return its rows."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(statement) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise SparkError(f"{answer['error']}\nin: {statement}")
        rows: list[dict[str, Any]] = answer["rows"]
        return rows

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        patience = threading.Timer(STATEMENT_SECONDS, self.process.kill)
        patience.start()
        try:
            line = self.process.stdout.readline()
        finally:
            patience.cancel()
        if not line:
            raise SparkError(f"Spark ended: {self.log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line, object_hook=_value)
        return answer

    def end(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()  # the runner ends with its input
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _value(fields: dict[str, Any]) -> Any:
    """What Runner.java writes as an object with one field that names the type."""
    readers: dict[str, Callable[[Any], Any]] = {
        "$timestamp": _moment,
        "$timestamp_ntz": lambda value: _moment(value).replace(tzinfo=None),
        "$date": date.fromisoformat,
        "$decimal": Decimal,
        "$binary": base64.b64decode,
    }
    for name, value in fields.items():
        return readers[name](value) if name in readers else fields
    return fields


def _moment(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)


def literal(value: Any) -> str:
    """A value of Python as SQL, of exactly the same value."""
    if value is None:
        return "NULL"
    if isinstance(value, bool | int):
        return str(value).upper()
    if isinstance(value, float):
        text = (
            repr(value) if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
        )
        return f"DOUBLE('{text}')"
    if isinstance(value, datetime):
        zone = "" if value.tzinfo is None else "Z"
        return f"TIMESTAMP{'' if zone else '_NTZ'}'{value.replace(tzinfo=None).isoformat(' ')}{zone}'"
    if isinstance(value, date):
        return f"DATE'{value.isoformat()}'"
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
