"""Views of a run, from any machine, during the run and after it ended.

`snapshot` reads the state of a run, as `rlbroker status` shows it; `findings` derives every finding from it; `watch`
and `timeline` add the history. The other modules each read one subject: runs, queues, dead letters, weights, commands.
Nothing here changes a run, except `dead_letters.retry` and `purge`.
"""
