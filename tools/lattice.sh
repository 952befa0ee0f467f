#!/usr/bin/env bash
# Build the lattice CRF, the optional extra `crf`, and run the tests that need it. `make lattice` calls this.
# usage: tools/lattice.sh VENV
# There is no wheel of it for the Pythons that run this repository, and its source needs a C++ compiler: so it is not in
# requirements.lock. It is built into a folder of its own below the environment, which stays that of the lock, and again
# when its version changes.
set -euo pipefail
venv=${1:-.venv}
cd "$(dirname "$0")/.."

lock=tools/requirements-crf.lock
folder="$venv/lattice-$(sha256sum "$lock" | cut -c1-16)"
if [ ! -e "$folder" ]; then
    command -v c++ >/dev/null || { echo "the lattice CRF needs a C++ compiler: install one (on Debian, g++)" >&2; exit 1; }
    rm -rf "$venv"/lattice-*
    echo "Building the lattice CRF (once; about half a minute)"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
        --target "$folder.new" -r "$lock"
    mv "$folder.new" "$folder"
fi
# With the variable set, a test that would be skipped for want of the package fails.
WSOLNB_LATTICE=1 PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" \
    "$venv/bin/python" -m pytest tests/methods/test_crf.py -k lattice
