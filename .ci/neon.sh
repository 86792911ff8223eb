#!/usr/bin/env bash
# Builds the extension for Linux on arm64 and runs the ops' tests on it, under qemu: NEON's kernels
# against the definitions, row by row, and against the bits of AVX2.
#
#   .ci/neon.sh [WORK [TESTS...]]     WORK: where to build, a temporary directory by default;
#                                     TESTS: tests/ops by default
#
# Takes a Debian's Python and headers for arm64 from a Debian mirror and wheels for arm64 from PyPI.
# Not part of .ci/run: the tests take hours. Needs root for apt-get where a tool is missing, and an
# x86_64 Debian with Python 3.11.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-}
if [ -z "$work" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
tests=("${@:2}")
[ ${#tests[@]} -gt 0 ] || tests=(tests/ops)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

missing=()
command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v debootstrap >/dev/null || missing+=(debootstrap)
[ ${#missing[@]} -eq 0 ] || { apt-get update -qq && apt-get install -y -qq "${missing[@]}"; }

mkdir -p "$work"
root=$work/root site=$work/site
[ -x "$work/tools/bin/python" ] || python3.11 -m venv "$work/tools"
python=$work/tools/bin/python
"$python" -m pip install "cmake>=4" ninja nanobind==3.1.0

if [ ! -d "$root/usr/include/python3.11" ]; then # unpacked, not installed: nothing of it is run but Python
  debootstrap --download-only --arch=arm64 --variant=minbase \
    --include=python3.11,libpython3.11-dev bookworm "$root" "$mirror" > "$work/debootstrap.log"
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
fi
if [ ! -d "$site/mlx" ]; then
  mlx=$(sed -n 's/^set(PYENGINE_MLX_VERSION "\(.*\)")/\1/p' "$here/cmake/Prerequisites.cmake")
  "$python" -m pip download --only-binary :all: --python-version 3.11 -d "$work/wheels" \
    --platform manylinux_2_35_aarch64 --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    "mlx[cpu]==$mlx" numpy scipy jinja2 sentencepiece tokenizers typer rich regex \
    pytest pytest-benchmark pytest-xdist hypothesis
  for wheel in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
fi

nanobind=$("$python" -m nanobind --cmake_dir)
PATH=$work/tools/bin:$PATH cmake -G Ninja -S "$here" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-I$root/usr/include" \
  -DPython_EXECUTABLE="$python" -DPython_INCLUDE_DIR="$root/usr/include/python3.11" \
  -DSKBUILD_SOABI=cpython-311-aarch64-linux-gnu -Dnanobind_ROOT="$nanobind" -DMLX_ROOT="$site/mlx" \
  > "$work/configure.log" 2>&1 || { tail -30 "$work/configure.log"; exit 1; }
"$work/tools/bin/ninja" -C "$work/build" > "$work/build.log" 2>&1 ||
  { grep -E "error|FAILED" "$work/build.log" || tail -30 "$work/build.log"; exit 1; }

rm -rf "$work/tree"
mkdir "$work/tree"
git -C "$here" archive HEAD | tar -x -C "$work/tree"
cp "$work"/build/_ext*.so "$work/tree/pyengine/"
ln -s "$site/mlx" "$work/tree/mlx" # where the extension looks for libmlx
cd "$work/tree"
qemu-aarch64-static -L "$root" -E "PYTHONPATH=$work/tree:$site" "$root/usr/bin/python3.11" \
  -m pytest -q -p no:cacheprovider "${tests[@]}"
