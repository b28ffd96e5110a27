"""Values to bytes and back: the wire format of weights and batches.

Pure: no Redis, clock, thread or environment. `message` makes and reads one message; `plan` and `assembly` are its
halves, for those who store the segments apart. `image` writes and reads weights that lie in one flat buffer,
whole or as a difference to another. The format is in docs/wire-format.md.
"""
