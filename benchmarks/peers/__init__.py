"""What one would use without rlbroker, each at its best simple setting."""
