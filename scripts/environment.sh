# Sourced by the other scripts: creates .venv and installs into it. It reinstalls only when the pinned versions change.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# prepare EXTRA: install rlbroker[EXTRA] into .venv, with the versions of constraints.txt.
prepare() {
  local extra="$1" python="${PYTHON:-python3}" stamp state log
  if [ ! -x .venv/bin/python ]; then
    command -v "$python" >/dev/null || die "$python was not found: install Python 3.11 or newer, or set PYTHON=/path/to/python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      die "$("$python" --version) is too old: rlbroker needs 3.11 or newer. Set PYTHON=/path/to/a/newer/python"
    say "creating .venv with $("$python" --version)"
    "$python" -m venv .venv ||
      die "$python cannot create virtual environments (on Debian: apt install python3-venv). Or set PYTHON=/path/to/another/python"
  fi
  # The stamp has a checksum, not a time: switching branches back and forth does not reinstall.
  stamp=".venv/.rlbroker-$extra"
  state="$root $(cat pyproject.toml constraints.txt | cksum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then return; fi
  say "installing rlbroker[$extra] into .venv: takes a minute, or several if PyTorch is downloaded with CUDA"
  log="$(mktemp)"
  if ! .venv/bin/python -m pip install --disable-pip-version-check --quiet \
      -e ".[$extra]" -c constraints.txt >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    die "the installation failed, see above"
  fi
  rm -f "$log"
  printf '%s' "$state" >"$stamp"
}
