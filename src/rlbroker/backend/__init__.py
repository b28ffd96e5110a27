"""The one boundary to Redis: connections, topology, keys, scripts, and the mapping of errors."""
