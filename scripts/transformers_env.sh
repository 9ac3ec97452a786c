#!/usr/bin/env bash
# A Python with PyTorch and Transformers in $SARAI_CACHE, as `make test-transformers` needs it; prints it. 1.8 GB.
set -euo pipefail
cache=${SARAI_CACHE:-$HOME/.cache/sarai}/transformers
folder=$(cd "$(dirname "$0")/../tests/transformers" && pwd)
if ! cmp -s "$folder/requirements.txt" "$cache/requirements.txt"; then
  python3 -m venv "$cache" >&2
  # Without what they depend on: of that, the list has what is needed without a GPU.
  "$cache/bin/pip" install --quiet --no-deps -r "$folder/requirements.txt" >&2
  "$cache/bin/python" "$folder/native_libs.py" >/dev/null
  cp "$folder/requirements.txt" "$cache/requirements.txt"
fi
echo "$cache/bin/python"
