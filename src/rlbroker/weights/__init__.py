"""Weights on their way from the learner to its workers.

    learner -> publisher -> upload, commit -> (Redis) -> subscriber -> worker

All other modules are leaves that these call and that call nothing back: `manifest` (what is stored), `retention` (how
long chunks stay), `download` and `loading`, `version_channel` and `update_queue` (between the subscriber and `poll`),
`gpu_copy` and `host_cache` (memory for images).
"""
