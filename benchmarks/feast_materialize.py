"""Measures Feast's materialize on rows of the same shape: sizes in, one JSON object out.

Feast lives in a virtual environment of its own in the user's cache folder, made on the first run. It reads one local
Parquet file and writes to an empty server; with ``skip_dedup: false`` it reads each entity's stored event time before
it writes, which is what makes its runs safe to repeat; with ``skip_dedup: true``, its unsafe mode, it does not. Its other settings are the fast ones that its documentation
recommends: large write batches, the latest row per entity picked by the offline store, hiredis, a local registry
without refresh.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers import KINDS, Server, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

FEAST = "0.67.0"
#: Entities per write, `materialization.online_write_batch_size`; Feast advises 10,000 to 50,000 for Redis.
WRITE_BATCH = 10_000
STAGES = Path(__file__).with_name("feast_stages.py")
SETTINGS = """\
project: benchmark
provider: local
registry:
  path: {work}/registry.db
  cache_ttl_seconds: 0
online_store:
  type: redis
  connection_string: "127.0.0.1:{port}"
  skip_dedup: {skip_dedup}
offline_store:
  type: dask
batch_engine:
  type: local
materialization:
  pull_latest_features: {pull_latest}
  online_write_batch_size: {batch}
entity_key_serialization_version: 3
"""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "materialize-benchmarks"


def feast_python() -> Path:
    """The Python of Feast's virtual environment, made with uv when it is not there."""
    venv = cache_folder() / f"feast-{FEAST}"
    python = venv / "bin" / "python"
    marker = venv / "installed"
    requirements = [f"feast[aws,redis]=={FEAST}", "hiredis"]
    if marker.exists() and marker.read_text().split() == requirements:
        return python
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(venv)], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *requirements], check=True)
    marker.write_text("\n".join(requirements))
    return python


def run_stage(stage: str, work: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Run one stage in its own process; its figures, or the end of its talk and an exit."""
    command = [str(feast_python()), str(STAGES), stage, "--work", str(work)]
    for name, value in sizes.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "FEAST_USAGE": "False"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"Feast's stage {stage} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(server: Server, sizes: dict[str, int], *, reads: int = 0, skip_dedup: bool = False) -> dict[str, Any]:
    """Load a generated file into the empty *server* and check a sample. Exits when a value is wrong or missing.

    With *reads*, ``waits`` are the seconds of each of so many reads of one entity, and of a twentieth as many of a hundred.
    """
    with prepared(server, sizes) as work:
        return materialized(server, sizes, work, reads=reads, skip_dedup=skip_dedup)


@contextmanager
def prepared(server: Server, sizes: dict[str, int]) -> Iterator[Path]:
    """A folder with a generated file and its feature view registered, for any number of `materialized`."""
    with tempfile.TemporaryDirectory(prefix="bench-feast-") as folder:
        work = Path(folder)
        write_settings(work, server, sizes, skip_dedup=False)
        run_stage("source", work, sizes)
        run_stage("apply", work, sizes)
        yield work


def write_settings(work: Path, server: Server, sizes: dict[str, int], *, skip_dedup: bool) -> None:
    settings = SETTINGS.format(
        work=work,
        port=server.port,
        pull_latest="true" if sizes["rows_per_entity"] > 1 else "false",
        batch=WRITE_BATCH,
        skip_dedup=str(skip_dedup).lower(),
    )
    (work / "feature_store.yaml").write_text(settings)


def materialized(
    server: Server, sizes: dict[str, int], work: Path, *, reads: int = 0, skip_dedup: bool = False
) -> dict[str, Any]:
    """What `measure` says, from a folder that is `prepared`."""
    write_settings(work, server, sizes, skip_dedup=skip_dedup)
    memory = server.memory()
    figures = run_stage("materialize", work, sizes)
    bytes_per_entity = {name: (used - memory[name]) / sizes["entities"] for name, used in server.memory().items()}
    check = run_stage("verify", work, sizes)
    waits = run_stage("read", work, {**sizes, "reads": reads}) if reads else {}
    if check["wrong"]:
        raise SystemExit(f"Feast: {check['wrong']} of {check['checked']} sampled entities are missing or wrong")
    return {"feast": FEAST, **sizes, **figures, **check, "bytes_per_entity": bytes_per_entity, "waits": waits}


def main() -> None:
    """Print the figures as one JSON object."""
    parser = argparse.ArgumentParser(description="Measure Feast's materialize, in its safe mode.")
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--rows-per-entity", type=int, default=3)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--server", choices=KINDS, default="redis")
    parser.add_argument("--unsafe", action="store_true", help="do not read what is stored before a write")
    sizes = vars(parser.parse_args())
    unsafe = sizes.pop("unsafe")
    with running_server(sizes.pop("server")) as server:
        print(json.dumps({"server": server.name, **measure(server, sizes, skip_dedup=unsafe)}))


if __name__ == "__main__":
    main()
