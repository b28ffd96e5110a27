"""The metrics of runs for Prometheus: `metrics` defines them, `collector` reads them. Needs prometheus-client."""
