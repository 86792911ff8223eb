"""Compile every kernel of a file as strictly as can be: all warnings, and all of them errors."""

from __future__ import annotations

import os
from pathlib import Path

from .entry import within
from .library import METAL, preprocess, syntax_flags
from .rewrite import rewrite
from .toolchain import CACHE, OVERLAY, CompileError, compiler

# Metal's compiler and Xcode's default warnings know no unused functions in headers.
_STRICT = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function")


def problems(path: Path) -> str:
    """What is wrong with a .metal file; empty if nothing is.

    The text must be ASCII, as Metal's run-time compiler wants it, and every kernel in it must
    compile without a warning, whatever the values of its function constants.
    """
    text = path.read_bytes()
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.isascii():
            return f"{path}:{number}: the text must be ASCII"
    try:
        unit = rewrite(preprocess(path.resolve(), [OVERLAY, METAL]), {})
    except CompileError as error:
        return str(error)
    if unit.mistakes:
        return "\n".join(unit.mistakes)
    instances = ""
    for what in unit.hosts.values():
        name = what.partition("<")[0].split("::")[-1].strip()
        if name in unit.templates:
            scope = unit.namespaces[name]
            instances += within(scope, f"template decltype({what}) {what};\n")
    CACHE.mkdir(parents=True, exist_ok=True)
    written = CACHE / f"strict-{path.stem}.{os.getpid()}.cpp"
    # Only for its warnings; not -fsyntax-only, with which zig looks for an object and finds none.
    object_file = written.with_suffix(".o")
    written.write_text(f"#include <metal_stdlib>\n{unit.text}\n{instances}")
    try:
        flags = [*compiler().options, *syntax_flags(), *_STRICT]
        return compiler().call([*flags, "-c", str(written), "-o", str(object_file)])
    except CompileError as error:
        return str(error)
    finally:
        written.unlink(missing_ok=True)
        object_file.unlink(missing_ok=True)
