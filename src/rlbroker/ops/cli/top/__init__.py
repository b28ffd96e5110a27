"""`rlbroker top`: the command (`top_command`), and the screen that it draws.

`key_bindings` changes the `ViewState` when keys are pressed, `view` draws a `RunView` with that state as lines,
`table` is the part of the lines about workers, and `terminal` shows lines and reads keys.
"""
