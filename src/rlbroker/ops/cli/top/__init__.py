"""`rlbroker top`: the command, and the screen that it draws."""
