#!/usr/bin/env bash
# Runs all tests. End-to-end tests that wait for most of their time (`waits::`) have a process of their own beside the others, and are told
# of when these are through. The arguments are cargo's.
set -euo pipefail

told=$(mktemp)
# With the whole workspace, so that it is the same program.
cargo test "$@" --workspace --test end_to_end -- waits:: > "$told" 2>&1 &
beside=$!
trap 'rm -f "$told"; kill "$beside" 2> /dev/null || true' EXIT
failed=0
cargo test "$@" --workspace -- --skip waits:: || failed=$?
wait "$beside" || failed=$?
cat "$told"
if ! grep -q "^test waits::" "$told"; then
    echo "no test is called waits:: any more" >&2
    failed=1
fi
exit "$failed"
