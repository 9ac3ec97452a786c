#!/usr/bin/env bash
# Installs the system packages that the build needs and that are missing: a C++ compiler, cmake, clang with
# libclang (bindings of llama.cpp), and what the tests use. Debian with root; silent when nothing is missing.
set -euo pipefail

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need c++ g++
need cmake cmake
need make make
need clang clang
need git git
need curl curl
# Only `make test` needs it: the official JavaScript clients.
need node nodejs
need npm npm
# A network of its own for a test.
need ip iproute2
if ! python3 -c 'import ensurepip' 2>/dev/null; then missing+=(python3-venv); fi
if ! ls /usr/lib/llvm-*/lib/libclang*.so* >/dev/null 2>&1; then missing+=(libclang-dev); fi
if [ "${#missing[@]}" -gt 0 ]; then
    echo "installing ${missing[*]}" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi
