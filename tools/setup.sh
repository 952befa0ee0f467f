#!/usr/bin/env bash
# Create or refresh the virtual environment from requirements.lock. `make` calls this; it can be run by hand.
# usage: tools/setup.sh PYTHON VENV
# The environment is stamped with the hash of the lock file and pyproject.toml and left alone while they are unchanged.
set -euo pipefail
python=${1:-python3}
venv=${2:-.venv}
cd "$(dirname "$0")/.."

stamp="$venv/.stamp-$(cat requirements.lock pyproject.toml tools/setup.sh | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0

"$python" - <<'PY' || { echo "wsolnb needs Python >= 3.11; name one with 'make PYTHON=python3.12 ...'" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
echo "Setting up $venv from requirements.lock (once; about half a minute with uv, several minutes with pip)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
here="$venv/bin/python"

uv=$(command -v uv || true)
if [ -z "$uv" ] && [ -z "${WSOLNB_NO_UV:-}" ]; then
    version=$(sed -n 's/^uv==\([^ ;]*\).*/\1/p' requirements.lock)
    "$here" -m pip install -q "uv==$version" && uv="$venv/bin/uv" || uv=
fi
if [ -n "$uv" ] && [ -z "${WSOLNB_NO_UV:-}" ]; then
    install() { VIRTUAL_ENV="$venv" "$uv" pip install -q --python "$here" "$@"; }
else
    echo "uv is not used: installing with pip"
    install() { "$here" -m pip install -q --disable-pip-version-check "$@"; }
fi
install --require-hashes -r requirements.lock
install --no-deps --no-build-isolation -e .

# opencv-python links the X11 and OpenGL libraries that servers and containers often lack. The headless build of the
# same version is the same module without windows, which nothing here opens.
if ! "$here" -c "import cv2" 2>/dev/null; then
    echo "cv2 does not load on this machine (no libGL): using the headless build of the same version"
    "$here" -m pip uninstall -q -y opencv-python
    install --no-deps --require-hashes -r tools/requirements-headless.lock
    "$here" -c "import cv2"
fi
rm -f "$venv"/.stamp-*
touch "$stamp"
