"""Checks of a server, the runs on it, and this machine.

The checks are defined in `server_checks`, `node_checks`, `run_checks` and `host_checks`; `diagnosis` runs them.
"""
