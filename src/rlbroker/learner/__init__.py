"""The learner's client.

`communicator` is the public class. `parts` builds the objects of the other rooms and takes the run over; `maintenance`
is the background work; `restoration` writes back what a server has lost.
"""
