"""Write the kernels as string literals: embed_metal.py OUTPUT.h A.metal B.metal ...

The compiler of a running Mac has no include path, so our own headers are put in place of the lines
that include them. MLX hands a text to Metal as ASCII, and would fail on any other character without
naming it; here it is named.

Instantiations are kept apart from the text, one for each kernel, with a hash of both: a Mac then
compiles one of them where a file has nine, and nothing is hashed while it runs.
"""

import hashlib
import re
import sys
from pathlib import Path


def flatten(file: Path, seen: set[Path]) -> str:
    """The text of a file, with each of our headers in the place where it is first included."""
    seen.add(file)
    text = file.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            sys.exit(f"{file}:{number}: a Metal source must be ASCII but this line is not.")
    lines = []
    for line in text.splitlines():
        own = re.match(r'#include "([^"]+)"', line)
        if own:
            header = file.parent / own[1]
            lines.append("" if header in seen else flatten(header, seen))
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join(lines)


def kernels_of(text: str) -> tuple[str, dict[str, str]]:
    """The text without its instantiations; by host name of each kernel what to put behind it."""
    found = {}
    for statement in re.findall(r"^INSTANTIATE\([^;]*?\)$", text, re.MULTILINE):
        (name,) = re.findall(r'"(\w+)"', statement)
        found[name] = f"namespace pyengine {{\n{statement}\n}} // namespace pyengine\n"
        text = text.replace(statement + "\n", "")
    plain = re.findall(r'^\[\[host_name\(\s*"(\w+)"\)\]\]', text, re.MULTILINE)
    return text.rstrip() + "\n", found | dict.fromkeys(plain, "")


def main(output: Path, files: list[Path]) -> None:
    libraries, kernels = [], []
    for number, file in enumerate(files):
        text, found = kernels_of(flatten(file, set()))
        if not found:
            sys.exit(f"{file}: a Metal source must have a kernel but this has none.")
        libraries.append(f'{{"{file.stem}", R"metal({text})metal"}},')
        for name, more in found.items():
            digest = hashlib.sha256((text + more).encode()).hexdigest()[:16]
            place = f"&metal_libraries[{number}]"
            kernels.append(f'{{{place}, "{name}", R"metal({more})metal", "{digest}"}},')
    text = "\n".join(
        [
            "#pragma once",
            "// Written by cmake/embed_metal.py.",
            "",
            "namespace pyengine {",
            "struct MetalLibrary {",
            "  const char* name;",
            "  const char* text; // of all kernels, without instantiations",
            "};",
            "struct MetalKernel {",
            "  const MetalLibrary* library;",
            "  const char* name;",
            "  const char* instantiation; // to put behind the text; may be empty",
            "  const char* hash; // of both",
            "};",
            "inline constexpr MetalLibrary metal_libraries[] = {",
            *libraries,
            "};",
            "inline constexpr MetalKernel metal_kernels[] = {",
            *kernels,
            "};",
            "} // namespace pyengine",
            "",
        ]
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
