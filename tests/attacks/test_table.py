"""The page on security names every attack, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ATTACKS = Path(__file__).parent
PAGE = ATTACKS.parents[1] / "docs" / "security.md"

#: They show that the tools of others work.
TOOLS = {"test_without_tls_listening_would_show_it"}


def test_each_attack_is_in_the_table() -> None:
    there = {
        name
        for path in ATTACKS.glob("test_*_attacks.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert there - TOOLS == set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
