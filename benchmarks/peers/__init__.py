"""The peers: what one would use without rlbroker, each with its best simple settings."""
