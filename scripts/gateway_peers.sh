#!/usr/bin/env bash
# Installs what `make bench-gateway` measures beside sarai: nginx from Debian's packages and LiteLLM's proxy from PyPI.
# Prints variables that name them.
set -euo pipefail

litellm="${SARAI_CACHE:-$HOME/.cache/sarai}/litellm"
if ! command -v nginx >/dev/null && [ ! -x /usr/sbin/nginx ]; then
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light >&2
fi
if [ ! -x "$litellm/bin/litellm" ]; then
    python3 -m venv --clear "$litellm"
    "$litellm/bin/pip" install --quiet --disable-pip-version-check 'litellm[proxy]' >&2 || rm -rf "$litellm"
fi
echo "NGINX=$(command -v nginx || echo /usr/sbin/nginx) LITELLM=$(ls "$litellm/bin/litellm" 2>/dev/null || true)"
