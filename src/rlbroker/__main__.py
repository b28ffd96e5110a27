"""`python -m rlbroker`: the command line."""

from rlbroker.ops.cli import main

main()
