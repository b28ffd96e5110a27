"""Read-only views of a run, from any machine, during the run and after it ended."""
