"""The command line: ``materialize incremental|backfill|rebuild|plan|status|lookup|quarantine|doctor``.

Results go to standard output, talk to standard error. Exit codes: 0 done, 1 failed, 2 usage, 143 and 130
stopped by SIGTERM and by Ctrl-C: what is being written is finished, a second signal kills at once.
"""

from materialize.cli.commands import app, main
from materialize.cli.quarantine import quarantine

__all__ = ["app", "main"]

app.add_typer(quarantine, name="quarantine")
