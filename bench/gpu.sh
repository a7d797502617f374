#!/usr/bin/env bash
# Everything that needs a CUDA card, in eight minutes at the most, on a machine with torch and without a network:
#
#     make gpu-wheels                  # where there is a network: what that machine lacks, into gpu-wheels/
#     bench/gpu.sh --out FOLDER        # there: writes FOLDER/gpu.json, step by step
#     bench/gpu.sh --rehearse          # anywhere: the same steps on the CPU, with tiny sizes
#
# PYTHON: the python that holds torch (python3). Wheels are unpacked beside each other, so that nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="$(command -v "${PYTHON:-python3}")"
SITE="$(mktemp -d)"
trap 'rm -rf "$SITE"' EXIT
for name in mainstem fusionbench; do
    if compgen -G "gpu-wheels/$name/*.whl" >/dev/null; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
            --target "$SITE/$name" gpu-wheels/"$name"/*.whl || echo "gpu-wheels/$name does not fit this python" >&2
    fi
done
if [ -d "$SITE/fusionbench" ] && [ -z "${FUSIONBENCH_PYTHON:-}" ]; then
    export FUSIONBENCH_PYTHON="$PYTHON" FUSIONBENCH_PATH="$SITE/fusionbench"
fi
export PYTHONPATH="$SITE/mainstem${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m bench.gpu "$@"
