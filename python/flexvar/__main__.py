"""``python -m flexvar`` is the command line."""

from flexvar.cli import main

main()
