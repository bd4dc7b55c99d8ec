"""DynamoDB Local on 127.0.0.1, in memory: a port in, a server that answers until Ctrl-C out.

    python scripts/dynamodb_local.py --port 8000

It needs a JDK, 17 or newer, and Maven, which fetches the jars of ``dynamodb_local.pom.xml`` (50 MB) to the user's cache
folder, once. Only this machine can reach the server: Amazon's own program listens on every interface, therefore
``DynamoDbLocal.java`` starts its parts. It reports nothing to Amazon. The tables are gone when it ends.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
POM, LAUNCHER = HERE / "dynamodb_local.pom.xml", HERE / "DynamoDbLocal.java"
#: Seconds that fetching the jars may take, and compiling the launcher.
FETCH_SECONDS, COMPILE_SECONDS = 900.0, 60.0
OLDEST_JAVA = 17
#: Measured with Java 17 on two cores: answers after 0.8 s with one compiler, 1.4 s with both; 1,000 updates 0.8 s, 1.6 s.
JVM = ("-Xmx1g", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")
#: What is printed once it answers.
GREETING = """\
DynamoDB Local answers on http://127.0.0.1:PORT until Ctrl-C, for any credentials of letters and digits, such as
  export AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local
In online_stores.yaml:
  default: {url: "dynamodb://eu-central-1/fs?endpoint_url=http://127.0.0.1:PORT"}"""


def main() -> None:
    parser = argparse.ArgumentParser(description="DynamoDB Local on 127.0.0.1, in memory, until Ctrl-C.")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: 8000)")
    parser.add_argument("--fetch", action="store_true", help="only fetch what it needs")
    parser.add_argument("--end-with-stdin", action="store_true", help="also end when the standard input does")
    options = parser.parse_args()
    folder = fetched()
    if options.fetch:
        return
    command = ["java", *JVM, f"-Djava.io.tmpdir={tempfile.gettempdir()}"]
    command += ["-cp", f"{folder / 'classes'}{os.pathsep}{folder / 'jars'}/*", "DynamoDbLocal"]
    os.execvp("java", [*command, str(options.port), GREETING, str(options.end_with_stdin).lower()])


def fetched() -> Path:
    """The folder with the jars and the compiled launcher, made once per user and version of both files. Exits where that fails."""
    _need("java")
    told = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', told)
    if version is None or int(version[1]) < OLDEST_JAVA:
        _fail(f"found {told.strip()}, expected Java {OLDEST_JAVA} or newer")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "materialize-dynamodb-local"
    folder = root / hashlib.sha256(POM.read_bytes() + LAUNCHER.read_bytes()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    _need("javac", "mvn")
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    jars, classes = fresh / "jars", fresh / "classes"
    print(f"fetching the jars of DynamoDB Local to {folder}, once", file=sys.stderr)
    copy = ["mvn", "--batch-mode", "--quiet", "--file", str(POM), "dependency:copy-dependencies"]
    _run("fetch the jars", [*copy, "-DincludeScope=runtime", f"-DoutputDirectory={jars}"], FETCH_SECONDS)
    build = ["javac", "--release", str(OLDEST_JAVA), "-cp", f"{jars}/*", "-d", str(classes), str(LAUNCHER)]
    _run(f"compile {LAUNCHER.name}", build, COMPILE_SECONDS)
    fresh.rename(folder)


def _need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            _fail(f"found no {program} on PATH, expected a JDK, {OLDEST_JAVA} or newer, and Maven")


def _run(what: str, command: list[str], seconds: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        _fail(f"{command[0]} did not {what} within {seconds:.0f} s")
    if done.returncode != 0:
        _fail(f"{command[0]} could not {what}: {(done.stdout + done.stderr).strip()[-2000:]}")


def _fail(why: str) -> NoReturn:
    sys.exit(f"could not start DynamoDB Local: {why}")


if __name__ == "__main__":
    main()
