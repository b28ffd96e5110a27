"""Who takes part in a run: registration and heartbeats (worker), the roster (learner)."""
