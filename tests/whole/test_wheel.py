"""The wheel contains every file that the package reads at run time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_installed_wheel_has_scripts_and_templates_and_can_be_imported(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    source, installed = ROOT / "src", {path.relative_to(site) for path in site.rglob("*")}
    data = [
        path.relative_to(source) for path in source.rglob("*") if path.suffix in (".lua", ".jinja", ".typed")
    ]
    assert data
    assert installed.issuperset(data)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from rlbroker.learner import parts; print(parts.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(str(site))
