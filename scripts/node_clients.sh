#!/usr/bin/env bash
# Makes a folder with the official, unmodified JavaScript clients that the tests judge the APIs with. Prints its path.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="${SARAI_CACHE:-$HOME/.cache/sarai}/node-clients"
wanted=tests/clients/package.json
if ! cmp -s "$wanted" "$folder/installed.json"; then
    rm -rf "$folder"
    mkdir -p "$folder"
    cp "$wanted" "$folder/package.json"
    # A registry that hangs once is asked again soon.
    npm install --prefix "$folder" --loglevel error --no-audit --no-fund --fetch-timeout 30000 --fetch-retries 5 >&2
    cp "$wanted" "$folder/installed.json"
fi
echo "$folder"
