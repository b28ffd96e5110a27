"""The worker's client.

`client` is the public class. `parts` builds the objects of the other rooms, joins the run with them, and leaves it.
"""
