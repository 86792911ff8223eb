#!/usr/bin/env bash
# Builds the extension with AMX's tile instructions emulated (csrc/cpu/emulated_tiles.h) and runs the
# tests of `amx` on it: its bits must be those in tests/fixtures/op_bits.json. Where the processor
# lacks AVX-512 with VBMI or VNNI, which is all else that `amx` needs, nothing is built or tested.
#
#   .ci/tiles.sh WORK [PYTEST ARGUMENTS]     WORK: where to build; a second run there builds what changed
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=${1:?a folder to build in}
for flag in avx512f avx512bw avx512dq avx512vl avx512vbmi avx512_vnni; do
  grep -qw "$flag" /proc/cpuinfo ||
    { echo "The kernels of amx were not tested: this processor has no $flag."; exit 0; }
done
mkdir -p "$work"
work=$(cd "$work" && pwd)

# With the tools of this environment if it has them: those of an isolated build lie elsewhere every
# time, and all would be built anew.
isolation=$(python -c 'import scikit_build_core, nanobind' 2>/dev/null && echo --no-build-isolation || true)
rm -rf "$work/site"
pip install --quiet --no-deps $isolation --target "$work/site" \
  -C build-dir="$work/cmake" -C cmake.define.PYENGINE_EMULATE_TILES=ON "$here"

# Run in `site` and with -S: the checkout's or an editable installation would come before this one
packages=$(python -c 'import sys; print(":".join(path for path in sys.path if path))')
export PYTHONPATH="$work/site:$packages"
cd "$work/site"
python -S -c "from pyengine import _ext; assert _ext.instruction_sets()[-1] == 'amx'"
python -S -m pytest -q --rootdir "$here" -c "$here/pyproject.toml" \
  "$here/tests/ops/test_planes.py" "$here/tests/ops/test_op_bits.py" "${@:2}"
