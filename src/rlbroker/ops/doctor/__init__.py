"""Checks of a server, the runs on it, and this machine."""
