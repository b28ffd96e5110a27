"""Experiences: the worker's half sends batches, the learner's half collects and acknowledges them."""
