"""What a person runs a run with: the command line and what stands behind it."""
