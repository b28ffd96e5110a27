"""Running on real machines: configurations, and the programs that try them out."""
