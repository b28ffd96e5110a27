"""The experiences of a run: the worker sends batches, the learner collects and acknowledges them."""
