"""The command line, as `python -m rlbroker`."""

from rlbroker.ops.cli import main

main()
