#!/usr/bin/env bash
# What tests/gpu/run.sh needs on a machine without a package index: pydantic's wheels, and which commit this is.
#
#   [PYTHON_VERSION=3.12] tests/gpu/prepare.sh     writes .gpu/wheels (3 MB), which git ignores: take it along
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
rm -rf .gpu/wheels
"$python" -m pip --disable-pip-version-check download -q -d .gpu/wheels --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 "pydantic>=2.7"
{ git describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown; } > .gpu/wheels/commit
ls -s .gpu/wheels
