"""Weights: the learner's half publishes versions, the worker's half fetches and loads them."""
