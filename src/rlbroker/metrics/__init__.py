"""Counters of one learner process, the history of a run in Redis, and writers for TensorBoard."""
