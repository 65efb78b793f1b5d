#!/usr/bin/env bash
# Everything that is to be known of a CUDA machine, in at most nine minutes and without a network: see gpu.py. From a source
# tree with or without ./test's .venv; PYTHON names another interpreter. Arguments go to gpu.py: --device cpu --tiny.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export MUJOCO_GL="${MUJOCO_GL:-egl}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Simulators have processes of their own; more threads than cores only slow each other down
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" benchmarks/gpu.py "$@"
