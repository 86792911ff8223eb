"""Is everything there, and what does each op run? What ``pyengine doctor`` says."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata
from typing import Any

import mlx.core as mx

from pyengine import ops
from pyengine.checkpoint import memory

# Extra of pyproject.toml, the modules it brings, and what they serve.
EXTRAS = {
    "hub": (("huggingface_hub",), "names of the Hugging Face hub in place of folders"),
    "serve": (("fastapi", "uvicorn"), "pyengine serve"),
    "eval": (("lm_eval",), "python -m pyengine.evaluate, for lm-eval"),
}
CHECK_TOKENS = 24


def examine() -> dict[str, Any]:
    """Versions, device, ops, extras, and a short run of the embedded pair. Evaluates.

    Returns:
        A report ready for JSON. ``ok`` says that the engine works here; ``problems`` lists what
        does not, each with the line that fixes it, and ``hints`` what is merely absent.
    """
    from pyengine import __version__

    rows = ops.status()
    report: dict[str, Any] = {
        "versions": {
            "pyengine": __version__,
            "mlx": metadata.version("mlx"),
            "python": platform.python_version(),
        },
        "machine": {
            "os": platform.platform(),
            "device": str(mx.default_device()),
            "metal": mx.metal.is_available(),
            "available_bytes": memory.available_bytes(),
        },
        "ops": rows,
        "extras": {},
        "problems": [],
        "hints": [],
    }
    for extra, (modules, purpose) in EXTRAS.items():
        there = all(importlib.util.find_spec(module) is not None for module in modules)
        report["extras"][extra] = there
        if not there:
            report["hints"].append(
                f'{purpose}: {sys.executable} -m pip install "pyengine-mlx[{extra}]"'
            )
    loose = [row["op"] for row in rows if not row["row_stable"]]
    if loose:
        report["hints"].append(
            f"{', '.join(loose)} run as plain MLX here and are not row-stable: speculative greedy "
            "text may differ from plain text where two logits nearly tie"
        )
    try:
        report["check"] = _check()
        if not report["check"]["exact"] and not loose:
            report["problems"].append(
                "greedy speculative text differs from plain text though every op is row-stable: "
                "please report this with the output of pyengine doctor --json"
            )
    except (ValueError, RuntimeError, OSError) as error:
        report["problems"].append(
            f"the embedded pair does not run: {error} Install again, from the folder of the "
            f"source: {sys.executable} -m pip install --force-reinstall ."
        )
    report["ok"] = not report["problems"]
    return report


def _check() -> dict[str, Any]:
    """The same greedy text, plainly and speculatively, from the embedded pair."""
    from pyengine.generation import embedded_pair, generate
    from pyengine.sampling.settings import Sampling

    prompt = "Create a single-file HTML5 canvas Snake game."
    plain, speculative = (
        generate(
            prompt,
            pair=embedded_pair(),
            max_tokens=CHECK_TOKENS,
            sampling=Sampling(temperature=0.0),
            block_size=block_size,
        )
        for block_size in (1, 4)
    )
    return {
        "tokens": len(plain.tokens),
        "exact": plain.tokens == speculative.tokens,
        "acceptance": speculative.stats.acceptance,
    }
