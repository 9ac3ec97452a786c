#!/usr/bin/env bash
# Runs all tests. Those that `WAITING` names run in a process of their own beside the others, on the last core, and are told of when these
# are through. The arguments are cargo's.
set -euo pipefail

skip=()
for name in $WAITING; do skip+=(--skip "$name"); done
told=$(mktemp)
last_core=$(taskset -cp $$ | sed 's/.*[^0-9]//')
# With the whole workspace each time, so that these are the same programs. `golden` and `end_to_end` are all that stand in a folder `tests`.
taskset -c "$last_core" cargo test "$@" --workspace --test end_to_end -- --exact $WAITING > "$told" 2>&1 &
beside=$!
trap 'rm -f "$told"; kill "$beside" 2> /dev/null || true' EXIT
failed=0
cargo test "$@" --workspace --test end_to_end -- --exact "${skip[@]}" || failed=$?
cargo test "$@" --workspace --lib --bins --test golden || failed=$?
wait "$beside" || failed=$?
cat "$told"
if ! grep -q "^running $(wc -w <<< "$WAITING") tests" "$told"; then
    echo "a test that WAITING names is not there any more" >&2
    failed=1
fi
exit "$failed"
