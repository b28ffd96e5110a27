#!/usr/bin/env bash
# Create a separate environment for the peer Reverb, which needs numpy < 2 and a particular release of TensorFlow.
set -euo pipefail

folder=$(dirname "$0")/.reverb
limit_seconds=300

python3 -m venv "$folder"
if ! timeout "$limit_seconds" "$folder/bin/pip" install --quiet --only-binary :all: \
    "numpy<2" "dm-reverb[tensorflow]" >"$folder/pip.log" 2>&1; then
    echo "Reverb could not be installed within $limit_seconds s:" >&2
    tail -n 5 "$folder/pip.log" >&2
    exit 1
fi
if ! "$folder/bin/python" -c "import reverb" 2>"$folder/import.log"; then
    echo "Reverb was installed, but it cannot be imported:" >&2
    tail -n 3 "$folder/import.log" >&2
    exit 1
fi
echo "Reverb is ready: $folder/bin/python"
