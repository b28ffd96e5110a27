"""Commands, and the final outcome of every command and version at every worker.

A command passes through these files:

1. commands.py (learner): `CommandSender` puts it onto the run's control stream and marks it as pending.
2. inbox.py (worker): `Inbox` reads it (control_reader.py), checks its signature (command_signature.py), and queues it
   until the worker polls. `CommandHandlers` (command_handlers.py) then obeys it.
3. acknowledgements.py (worker): `AcknowledgementSender` writes its outcome to the worker's acknowledgement stream.
4. ledger.py (learner): `Ledger` folds the acknowledgement into the worker's outcomes (outcomes.py) and removes it from
   the pending commands. `Command.wait` returns.

Steps 3 and 4 apply to versions too: a worker acknowledges each version that it applied or failed to load.
version_outcomes.py remembers these outcomes, and `PublishReceipt.wait_applied` (version_waiter.py) returns. Both kinds
of waiting are in settlements.py.
"""
