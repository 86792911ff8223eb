"""Write the kernels as string literals: embed_metal.py OUTPUT.h A.metal B.metal ...

The compiler of a running Mac has no include path, so our own headers are put in place of the lines
that include them. MLX hands a text to Metal as ASCII, and would fail on any other character without
naming it; here it is named.
"""

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


def main(output: Path, kernels: list[Path]) -> None:
    entries = [f'{{"{file.stem}", R"metal({flatten(file, set())})metal"}},' for file in kernels]
    text = "\n".join(
        [
            "#pragma once",
            "// Written by cmake/embed_metal.py.",
            "#include <utility>",
            "",
            "namespace pyengine {",
            "inline constexpr std::pair<const char*, const char*> metal_sources[] = {",
            *entries,
            "};",
            "} // namespace pyengine",
            "",
        ]
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
