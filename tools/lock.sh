#!/usr/bin/env bash
# Rewrite requirements.lock, and the locks of the headless OpenCV and of the lattice CRF, from pyproject.toml: versions and
# hashes, no index addresses.
# usage: tools/lock.sh [--upgrade]
set -euo pipefail
cd "$(dirname "$0")/.."
options=(--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -q)
uv=$(command -v uv || echo .venv/bin/uv)
"$uv" pip compile pyproject.toml --extra cluster --extra dev --extra site "${options[@]}" "$@" -o requirements.lock
version=$(sed -n 's/^opencv-python==\([^ ;]*\).*/\1/p' requirements.lock)
echo "opencv-python-headless==$version" | "$uv" pip compile - "${options[@]}" --no-deps -o tools/requirements-headless.lock
sed -n 's/^crf = \["\(.*\)"\]$/\1/p' pyproject.toml |
    "$uv" pip compile - "${options[@]}" --no-deps -o tools/requirements-crf.lock
