#!/usr/bin/env bash
# Makes a virtual environment with the official, unmodified clients that the tests judge the APIs with, and the
# package that writes GGUF files.
# Prints the path of its Python.
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${SARAI_CACHE:-$HOME/.cache/sarai}/clients"
wanted=tests/clients/requirements.txt
if ! cmp -s "$wanted" "$venv/installed.txt"; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$wanted" >&2
    cp "$wanted" "$venv/installed.txt"
fi
echo "$venv/bin/python"
