"""``python -m materialize.cli``: the command line where the console script is not on the path."""

from materialize.cli.commands import main

main()
