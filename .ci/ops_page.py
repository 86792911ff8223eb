"""Write what follows from the ops' own files: the package's head, and docs/ops.md.

    python .ci/ops_page.py        # both, anew

Run it for a new op, and after a change of an op's docstring.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyengine/ops/__init__.py"
NOT_OPS = {"__init__", "dispatch", "workbench"}  # of the package's files


def op_names() -> list[str]:
    return sorted({path.stem for path in PACKAGE.parent.glob("*.py")} - NOT_OPS)


def package() -> str:
    """The head of `pyengine.ops`: explicit imports, so that every call is type-checked."""
    modules = {name: [name, f"{name}_reference"] for name in op_names()}
    modules["dispatch"] = ["status", "use"]
    imports = [f"from .{name} import {', '.join(modules[name])}" for name in sorted(modules)]
    names = sorted(name for exported in modules.values() for name in exported)
    return "\n".join(
        [
            '"""The engine\'s ops: each a public function and its reference in plain MLX.',
            "",
            "Generated from the files beside this one by `python .ci/ops_page.py`.",
            '"""',
            "",
            *imports,
            "",
            "__all__ = [",
            *(f'    "{name}",' for name in names),
            "]",
            "",
        ]
    )


def main() -> None:
    PACKAGE.write_text(package())


if __name__ == "__main__":
    main()
