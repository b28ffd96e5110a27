"""`rlbroker top`: `top_command` is the command, and the other modules are its screen.

`key_bindings` changes the `ViewState` after a key. `view` draws a `RunView` with that state as lines, and `table` the
lines about workers. `terminal` shows the lines and reads keys.
"""
