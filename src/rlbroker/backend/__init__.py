"""The one boundary to Redis: connections, topology, keys, scripts, and the translation of errors."""
