"""The learner's client.

`communicator` is its public face. `parts` wires the objects of the rooms and takes the run over; `maintenance` is the
background work; `restoration` writes back what a server has lost.
"""
