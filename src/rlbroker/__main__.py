"""`python -m rlbroker`: the command line."""

from rlbroker.cli import main

main()
