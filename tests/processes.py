"""How a process that was started for a test or a benchmark ends."""

from __future__ import annotations

import subprocess

__all__ = ["end"]

#: Seconds that a process gets to end by itself.
GRACE = 10.0


def end(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """Close its input, ask it to stop, and after *grace* seconds make it. Returns when it is gone."""
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
