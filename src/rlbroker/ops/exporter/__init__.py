"""The metrics of runs for Prometheus: `metrics` defines them, `prometheus_collector` reads them."""
