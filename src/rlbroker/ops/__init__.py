"""The command line, and what its commands are made of: reading runs, diagnosis, metrics, reports, pruning."""
