"""c++ for macOS arm64 on any machine: zig's clang, told in its own words what CMake wants.

The package ziglang must be installed in the Python that runs this.
"""

import os
import sys


def translated(flag: str) -> list[str]:
    if flag.startswith("-Wl,@"):  # nanobind's list of CPython symbols; checked afterwards
        return ["-Wl,-undefined,dynamic_lookup"]
    if flag == "-bundle":  # zig 0.17.1 crashes on it; a dylib has the same symbols
        return ["-shared"]
    if flag in ("-Wl,-x", "-Wl,-S") or flag.startswith(("-mmacosx-version-min", "-isysroot")):
        return []
    return [flag]


flags = [word for flag in sys.argv[1:] for word in translated(flag)]
zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0"]
os.execv(sys.executable, zig + flags)
