"""One run as its learner keeps it: options, shards, background work, and repair after a loss."""
