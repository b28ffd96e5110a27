"""Values to bytes and back: the wire format of weights and batches, as docs/wire-format.md describes it.

Pure: no Redis, clock, thread or environment. Bytes from the wire are hostile until checked; invalid ones raise
WireError. From the top down:

- `message` writes and reads one tree as one string of bytes; `describe` lists the contents without building them.
- `image` writes and reads weights as one flat buffer, whole or as a difference from another one.
- `format` is the layout of a message, `compression` and `delta` the storage of its segments.
- `tree`, `leaves`, `tensors` and `dtypes` are the parts of a tree; `limits` bounds all of them.
- `foreign` reads the values of other libraries, and `refusals` says why a value cannot travel.
- `registration` makes torch and JAX know `Batch`.
- `signing` is the key that learner and workers share.
"""
