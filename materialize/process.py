"""A process in, a name for it that is never used again out; and whether a process of such a name still lives, as far as this one can tell."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path

__all__ = ["gone", "here", "name", "person"]

PROC = Path("/proc")
#: Of /proc/PID/stat behind the program's name: the state, and the start in clock ticks since the machine's (proc(5), fields 3 and 22).
STATE, START = 0, 19
#: States of a process that is over and that nobody has waited for.
OVER = ("Z", "X")


def name() -> str | None:
    """This process: boot, pid namespace, pid, start. None where there is no /proc, so that nobody could tell whether it lives.

    The boot id makes it unique over machines and reboots, the namespace over containers, the start over pids that are used again.
    """
    place, found = _place(), _stat(os.getpid())
    return None if place is None or found is None else f"{place}/{os.getpid()}/{found[START]}"


def gone(process: str) -> bool:
    """Whether *process*, a `name`, is known to be over. False for one of another machine or container: from here nobody can tell."""
    place, pid, start = process.rsplit("/", 2)
    if place != _place():
        return False
    found = _stat(int(pid))
    return found is None or found[START] != start or found[STATE] in OVER


def here() -> str:
    """This process for people: ``host/pid``."""
    return f"{socket.gethostname()}/{os.getpid()}"


def person() -> str:
    """The user of this process for people; its number where it has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _place() -> str | None:
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def _stat(pid: int) -> list[str] | None:
    """What /proc says of *pid* behind its name, which may have spaces and brackets; None when there is no such process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
