#!/usr/bin/env bash
# kvpass on this machine's GPU: right, and how fast? Without a GPU the same stages run small, in Triton's interpreter.
#
#   OUT=folder tests/gpu/run.sh [--only environment,cases] [--seconds 480]
#
#   OUT     where the JSON of each stage goes (.gpu/out)
#   PYTHON  an interpreter with torch, triton, transformers, pytest (the checkout's .venv, else python3). Nothing is
#           installed; what it lacks of pydantic comes from the wheels that tests/gpu/prepare.sh put into .gpu/wheels.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
OUT=${OUT:-$root/.gpu/out}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# The packages as they install, by links: the folder kernels/ is imported as kvpass.kernels.
mkdir "$site/kvpass"
ln -s "$root"/kvpass/* "$root/kernels" "$root/patterns" "$site/kvpass/"
ln -s "$root/tests/gpu" "$site/gpu"
if ! "$python" -P -c 'import pydantic' 2>/dev/null; then
  for wheel in "$root"/.gpu/wheels/*.whl; do
    [ -e "$wheel" ] || { echo "$python has no pydantic, and .gpu/wheels no wheel of it: run tests/gpu/prepare.sh where a package index is" >&2; exit 2; }
    "$python" -P -m zipfile -e "$wheel" "$site"
  done
  PYTHONPATH=$site "$python" -P -c 'import pydantic' || { echo "the wheels in .gpu/wheels are not for $("$python" --version): PYTHON_VERSION=3.x tests/gpu/prepare.sh" >&2; exit 2; }
fi

export OUT PYTHONPATH="$site:$root/examples:$root/tests/kernels:$root/tests/support${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
"$python" -P -m gpu.run "$@"
