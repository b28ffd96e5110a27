"""The process that libFuzzer runs in; fuzz_decoders.py starts it."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["rlbroker", "decoder_targets"]):
    import decoder_targets

if __name__ == "__main__":
    atheris.Setup(sys.argv, decoder_targets.feed)
    atheris.Fuzz()
