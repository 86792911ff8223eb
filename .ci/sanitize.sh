#!/usr/bin/env bash
# Every public op under AddressSanitizer and UBSan: the extension is built with g++'s, for two
# instruction sets, and tests/fuzz/fuzz_ops.py calls it for a minute or as its own options say. MLX itself
# is not instrumented, but its memory comes from the malloc that is watched.
set -euo pipefail
cd "$(dirname "$0")/.."

site=build/sanitize/site
rm -rf "$site"
pip install --quiet --no-deps --target "$site" \
  -C build-dir=build/sanitize/cmake -C cmake.build-type=Debug -C install.strip=false \
  -C cmake.define.PYENGINE_SANITIZE=ON -C cmake.define.CMAKE_CXX_COMPILER=g++ .
grep -q __asan_report "$site"/pyengine/_ext*.so

# Both runtimes before all else, and the exceptions they look into. Python and MLX keep memory for
# good, so leaks are not looked for. -S: an editable install would come before this one.
libraries=$(for name in libasan.so libubsan.so libstdc++.so; do g++ -print-file-name=$name; done)
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD=$(echo $libraries) PYTHONPATH="$site:$packages" \
  python -S tests/fuzz/fuzz_ops.py "$@"
