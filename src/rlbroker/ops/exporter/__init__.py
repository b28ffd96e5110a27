"""Metrics of the runs on a server, for Prometheus."""
