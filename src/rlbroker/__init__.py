"""The Redis-backed broker between reinforcement-learning learners and rollout workers."""
