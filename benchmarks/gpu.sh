#!/usr/bin/env bash
# Everything that one GPU has to tell, in under 8 minutes and without a network:
#
#   bash benchmarks/gpu.sh [--output DIR] [--only 0.1B 2.4B loss layer tests]
#   bash benchmarks/gpu.sh --smoke        # the same steps at tiny sizes on the CPU, under a minute
#
# Steps: versions and card; training steps of 0.1B and 2.4B (tokens/s, utilisation, memory against the plan); the fused
# loss beside Liger, cut-cross-entropy and torch's; one layer of 2.4B, eager and under torch.compile; the tests that only
# a GPU can decide. One Markdown table comes last; a step that fails is a row of it, and the others go on. The project
# has no setting for torch.compile, so that training steps are eager.
#
# What must be there: python3 (3.12) with torch's CUDA build, and Triton as it comes with torch. The project's other
# packages are taken from the first of these that is there:
#   .venv/      as `make environment` makes it
#   .whl/       wheels, which are unpacked into .whl/site/ and come before python3's own packages; pip is not needed
#   python3     as it is
# Wheels are made on a machine that has the environment:
#   .venv/bin/pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia|cuda)' > wheels.txt
#   .venv/bin/pip wheel --no-deps --wheel-dir .whl -r wheels.txt        # peers, too: liger-kernel cut-cross-entropy
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=python3
if [ -x .venv/bin/python ]; then
  PYTHON=.venv/bin/python
elif compgen -G '.whl/*.whl' > /dev/null; then
  for wheel in .whl/*.whl; do "$PYTHON" -m zipfile --extract "$wheel" .whl/site; done
  PYTHONPATH=$PWD/.whl/site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" -c 'import torch' || { echo "error: $PYTHON has no torch; see the head of benchmarks/gpu.sh" >&2; exit 2; }

source examples/gpu_environment.sh

exec "$PYTHON" -m benchmarks.gpu "$@"
