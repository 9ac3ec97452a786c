#!/usr/bin/env bash
# Runs all tests. Those that `WAITING` names run in a process of their own beside the others, and are told of when these are through.
# The arguments are cargo's.
set -euo pipefail

skip=()
for name in $WAITING; do skip+=(--skip "$name"); done
told=$(mktemp)
# With the whole workspace each time, so that it is the same program.
cargo test "$@" --workspace --test end_to_end -- $WAITING > "$told" 2>&1 &
beside=$!
trap 'rm -f "$told"; kill "$beside" 2> /dev/null || true' EXIT
failed=0
cargo test "$@" --workspace --test end_to_end -- "${skip[@]}" || failed=$?
cargo test "$@" --workspace --lib --bins --test golden || failed=$?
wait "$beside" || failed=$?
cat "$told"
exit "$failed"
