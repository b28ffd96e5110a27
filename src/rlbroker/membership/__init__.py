"""The workers of a run: registration and heartbeats (worker), the roster (learner). lease.py has all times."""
