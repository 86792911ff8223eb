#!/usr/bin/env bash
# Compiles and links the macOS arm64 extension on Linux and checks every symbol it asks a Mac for.
# The result is never run: zig links its own libc++, so it is a check and no release.
#
#   .ci/cross_link.sh [WORK]     WORK: where to build; a temporary directory by default
#
# Takes from PyPI what it needs: zig, cmake, ninja, nanobind and the macOS wheel of mlx.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-}
if [ -z "$work" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

[ -x "$work/tools/bin/python" ] || python3 -m venv "$work/tools"
python=$work/tools/bin/python
"$python" -m pip install ziglang==0.17.1 "cmake>=4" ninja nanobind==3.1.0
mlx=$(sed -n 's/^set(PYENGINE_MLX_VERSION "\(.*\)")/\1/p' "$here/../cmake/Prerequisites.cmake")
if [ ! -d "$work/mac/mlx" ]; then
  "$python" -m pip download "mlx-metal==$mlx" --no-deps --only-binary :all: \
    --platform macosx_14_0_arm64 -d "$work/wheels"
  "$python" -m zipfile -e "$work"/wheels/mlx_metal-"$mlx"-*.whl "$work/mac"
fi

# CMake wants each tool as one program
tool() {
  printf '#!/bin/sh\nexec %s "$@"\n' "$2" > "$work/$1"
  chmod +x "$work/$1"
}
tool c++ "$python $here/cross/zig_cxx.py"
tool ar "$python -m ziglang ar"
tool ranlib "$python -m ziglang ranlib"

nanobind=$("$python" -m nanobind --cmake_dir)
export PATH=$work/tools/bin:$PATH
cmake -G Ninja -S "$here/.." -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=arm64 -DCMAKE_OSX_DEPLOYMENT_TARGET= \
  -DCMAKE_OSX_ARCHITECTURES= -DCMAKE_OSX_SYSROOT= -DCMAKE_CXX_COMPILER="$work/c++" \
  -DCMAKE_AR="$work/ar" -DCMAKE_RANLIB="$work/ranlib" -DCMAKE_INSTALL_NAME_TOOL=/bin/true \
  -DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=NEVER -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
  -DPython_EXECUTABLE="$python" \
  -DSKBUILD_SOABI=cpython-311-darwin -Dnanobind_ROOT="$nanobind" -DMLX_ROOT="$work/mac/mlx" \
  -DCMAKE_CXX_FLAGS="-isystem $here/cross/sdk" \
  -DCMAKE_MODULE_LINKER_FLAGS="-L$here/cross/sdk/lib" > "$work/configure.log" 2>&1 ||
  { tail -30 "$work/configure.log"; exit 1; }
ninja -C "$work/build" > "$work/build.log" 2>&1 ||
  { grep -E "error|FAILED" "$work/build.log" || tail -30 "$work/build.log"; exit 1; }
"$python" "$here/cross/check_symbols.py" "$work"/build/_ext*.so "$work/mac/mlx/lib/libmlx.dylib" \
  "$nanobind/darwin-ld-cpython.sym"
