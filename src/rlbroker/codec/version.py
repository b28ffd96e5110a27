"""The version of the wire format, apart from all that it takes to read and write it."""

from __future__ import annotations

#: What this release writes, and the only one that it reads.
FORMAT_VERSION: int = 1
