"""Coverage-guided fuzzing of every decoder; decoder_targets.py has the targets, and says what a finding is.

    pip install atheris
    python tests/fuzz/fuzz_decoders.py --minutes 10

New inputs are kept in the folder given with --corpus; --update writes a minimal corpus back to tests/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COMMITTED = HERE / "corpus"


def main() -> int:
    """Run the fuzzer in a process of its own, as it never returns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--corpus", type=Path, help="folder for new inputs; a temporary one by default")
    parser.add_argument("--update", action="store_true", help="write a minimal corpus back")
    chosen = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("fuzzing needs atheris, which is not installed: pip install atheris")
    found = chosen.corpus or Path(tempfile.mkdtemp(prefix="rlbroker-fuzz-"))
    found.mkdir(parents=True, exist_ok=True)
    seconds = int(chosen.minutes * 60)
    harness = [sys.executable, str(HERE / "fuzz_harness.py")]
    common = ["-max_len=4096", "-rss_limit_mb=1024", "-timeout=20", f"-artifact_prefix={found}/find-"]
    status = subprocess.run(
        [*harness, str(found), str(COMMITTED), f"-max_total_time={seconds}", *common]
    ).returncode
    print(f"new inputs and findings: {found}", file=sys.stderr)
    if chosen.update and status == 0:
        subprocess.run([*harness, str(COMMITTED), str(found), "-merge=1", "-max_len=2048"], check=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
