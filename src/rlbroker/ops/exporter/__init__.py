"""The metrics of runs for Prometheus; needs prometheus-client."""
