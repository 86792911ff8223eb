"""Write what follows from the ops' own files: the head of their package, and docs/ops.md.

    python .ci/ops_page.py        # both, anew; a minute or two where no kernel is compiled yet

Run it for a new op, and after a change of an op's docstring, bench or kernel. The page takes the
docstring, asks the extension for launches, and counts the bytes of the SMALL call of the op's bench
in the workbench.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyengine/ops/__init__.py"
PAGE = ROOT / "docs/ops.md"
SECTOR = 32
HEAD = """# Ops

Generated from the ops' own files by `python .ci/ops_page.py`; a test compares it with them.

Every op is a function of `pyengine.ops` with a processor kernel, a Metal kernel and a reference in
plain MLX, `X_reference`. [metal/README.md](../metal/README.md) says how the Metal kernels are made.

Both kernels are row-stable: the bits of a row depend on that row alone. The reference is so only
where it has no reduction.
"""
MOVED = """
## What a call moves

No GPU has run these kernels; the figures come from the [workbench](../workbench/README.md), for
one small call of the op's bench, `bench/bench_X.py`. None is a timing. *Must move*: the bytes of
all inputs and results that the call needs, each once. *Counted*: sectors of 32 bytes that a
threadgroup touches, each once per threadgroup, and what one launch leaves for the next with them.
A rule reads no draft after the one that it does not keep.

| op | call | launches | must move | counted | ratio |
| --- | --- | --: | --: | --: | --: |"""


def op_names() -> list[str]:
    files = PACKAGE.parent.glob("*.py")
    return sorted(p.stem for p in files if f"\ndef {p.stem}_reference(" in p.read_text())


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


def page() -> str:
    """docs/ops.md; runs the Metal kernels in the workbench.

    Raises:
        RuntimeError: There is no compiler.
    """
    from pyengine import ops

    ops.use("reference")
    try:
        stable = {row["op"]: row["row_stable"] for row in ops.status()}
    finally:
        ops.use("native")
    docs = {name: inspect.getdoc(getattr(ops, name)) or "" for name in op_names()}
    lines = [
        HEAD,
        "| op | does | the Metal kernel takes at most | past that | reference row-stable |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, doc in docs.items():
        limits = ", ".join(f"{limit} {what}" for what, limit in limits_of(name).items())
        cells = [f"[`{name}`](#{name})", plain(doc.split("\n\n")[0]), limits or "every call"]
        cells += [past_limits(doc), "yes" if stable[name] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(MOVED)
    for name in docs:
        call, launches, needed, counted = count(name)
        figures = f"{launches} | {needed:,} | {counted:,} | {counted / needed:.2f}"
        lines.append(f"| `{name}` | {call} | {figures} |")
    for name, doc in docs.items():
        signature = name + str(untyped(inspect.signature(getattr(ops, name))))
        block = [*textwrap.wrap(signature, 96, subsequent_indent="    "), "", *doc.splitlines()]
        lines += ["", f"## {name}", "", *(f"    {line}".rstrip() for line in block)]
    return "\n".join(lines) + "\n"


def untyped(signature: inspect.Signature) -> inspect.Signature:
    """Names and defaults: shapes and dtypes are in the docstring."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=signature.empty)


def plain(text: str) -> str:
    """One line of a table, with Markdown's spelling of code."""
    text = re.sub(r":\w+:`(\w+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", "\\|")


def past_limits(doc: str) -> str:
    """The sentence that says what a GPU runs instead of the kernel."""
    sentences = re.split(r"(?<=[.;])\s+", doc.partition("\n\nArgs:")[0])
    found = [s for s in sentences if re.search(r"\bGPU\b.*\b(serves?|runs?)\b", s, re.DOTALL)]
    return plain(" ".join(s[:1].upper() + s[1:] for s in found))


def limits_of(op: str) -> dict[str, int]:
    """The largest calls that the Metal kernel takes, as the op's tests have them.

    Raises:
        AssertionError: It takes larger ones, or not those.
    """
    from fuzz_ops import flat  # of the tests' folder

    from pyengine import _ext

    found = {}
    for what, (limit, call) in importlib.import_module(f"test_{op}").LIMITS.items():
        within, past = (_ext.launches_of(flat(call(n)))[0] for n in (limit, limit + 1))
        assert within and past is None, (op, what)
        found[what] = limit
    return found


def count(op: str) -> tuple[str, int, int, int]:
    """The SMALL call of its bench, launches, bytes that it must move, and those counted."""
    import timing  # of the bench folder

    from pyengine import _ext
    from pyengine.bench import arrays
    from pyengine.ops import workbench

    kept: list[Any] = []

    def compare(
        _: Any, kernel: Any, baseline: Any, turns: Any, *, nbytes: int, **rest: Any
    ) -> None:
        result = kernel(*turns[0])
        kept.extend((result, nbytes))

    bench = importlib.import_module(f"bench_{op}")
    once, timing.compare = timing.compare, compare
    copies, arrays.cold_copies = arrays.cold_copies, lambda nbytes: 1
    try:
        getattr(bench, f"test_{op}")(None, **bench.SMALL)
    finally:
        timing.compare, arrays.cold_copies = once, copies
    result, needed = kept
    launches, inputs = _ext.launches_of(result)
    assert launches
    given = workbench.named(launches, inputs)
    # attention leaves room for keys that its call does not see
    options = {"mode": "count", "allow": {"unwritten-output"}}
    _, report = workbench.load().run(launches, given, **options)
    constants = {b.name for launch in launches for b in launch.buffers if b.role == "bytes"}
    traffic = [entry for name, entry in report.traffic.items() if name not in constants]
    counted = SECTOR * sum(a.group_read_sectors + a.group_written_sectors for a in traffic)
    call = ", ".join(f"{name} {value}" for name, value in bench.SMALL.items())
    call = call.replace("mlx.core.", "")
    return call, report.launches, needed, counted


def main() -> None:
    PACKAGE.write_text(package())  # before it is imported
    PAGE.write_text(page())


sys.path += [str(ROOT / folder) for folder in ("bench", "tests/ops", "tests/fuzz", "tests/helpers")]

if __name__ == "__main__":
    main()
