#!/usr/bin/env bash
# Builds llama.cpp's own server from PyPI's source package `llama-cpp-python` into the cache directory, for the benchmarks.
# Prints the path of the binary. Does nothing when it is there already.
set -euo pipefail

version=0.3.36
cache="${SARAI_CACHE:-$HOME/.cache/sarai}/llama-server-$version"
binary="$cache/llama-server"
if [ -x "$binary" ]; then
    echo "$binary"
    exit 0
fi
mkdir -p "$cache/source"
cd "$cache/source"
echo "building llama-server of llama-cpp-python $version (about 10 minutes)" >&2
python3 -m pip download --quiet --no-deps --no-binary :all: "llama-cpp-python==$version" >&2
tar xzf "llama_cpp_python-$version.tar.gz"
cd "llama_cpp_python-$version/vendor/llama.cpp"
# With AMX, GCC makes a server of it that dies of its first prompt (crates/sarai-llama/src/tiles.rs).
flags=""
[ "$(uname -m)" != x86_64 ] || flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
cmake -B build -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_TESTS=OFF >&2
cmake --build build --target llama-server -j "$(nproc)" >&2
mv build/bin/llama-server "$binary"
rm -rf "$cache/source"
echo "$binary"
