"""The showcase: PPO on a Gymnasium environment, with learner and workers as separate processes.

Nothing is imported here: the parent process of `rlbroker demo` never pays for torch.
"""
