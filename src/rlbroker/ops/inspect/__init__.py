"""What an operator sees of a run, from any machine, while it goes on and after it ended; looking changes nothing."""
