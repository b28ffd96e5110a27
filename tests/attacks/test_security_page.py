"""The page on security names every attack that is tested, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ATTACKS = Path(__file__).parent
PAGE = ATTACKS.parents[1] / "docs" / "security.md"

#: Tests that the tools of other tests work.
TOOLS = {"test_the_wiretap_sees_what_travels_without_tls"}


def test_the_page_on_security_names_every_attack() -> None:
    tests = {
        name
        for path in ATTACKS.glob("test_*_attacks.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert tests - TOOLS == set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
