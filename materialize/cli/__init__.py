"""The command line: ``materialize incremental|backfill|rebuild|plan|push|status|lookup|explain|serve|quarantine|doctor|forget|release``.

Results go to standard output, talk to standard error. Exit codes: 0 done, 1 failed, 2 usage, 143 and 130
stopped by SIGTERM and by Ctrl-C: what is being written is finished, a second signal kills at once. ``serve`` is ended by
them, once what is under way is answered, and is done.
"""

from materialize.cli.commands import app, main

__all__ = ["app", "main"]
