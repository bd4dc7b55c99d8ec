"""Where figures were measured: the machine, the versions and the command, as data and as Markdown."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["environment", "where"]


def processor() -> str:
    """The CPU model, from Linux where it is there."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def environment(server_name: str) -> dict[str, Any]:
    """The machine, the versions and the command: what a reader needs to judge and repeat the figures."""
    packages = ("polars", "deltalake", "pyarrow", "redis", "hiredis")
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "server": server_name,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def where(setting: dict[str, Any]) -> list[str]:
    """The command and the machine, as lines of Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in setting["packages"].items())
    machine = f"{setting['cpu']}, {setting['cores']} cores, {setting['memory_gib']} GiB, {setting['server']}"
    return [f"`{setting['command']}`", "", f"{machine}, Python {setting['python']}, {packages}."]
