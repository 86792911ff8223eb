"""A pair whose weights are most of a process's memory: the tiny 31B's layout, much wider.

python tests/ranks/wide.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx

TINY = Path(__file__).parents[1] / "fixtures/dense31"
WIDTH = 8192  # of the feed-forward part; 64 in the fixture
MODEL = 1024  # the model's, 64 in the fixture


def write(folder: Path) -> None:
    """target/ alone, in the published form; bfloat16, about 350 MB."""
    own = folder / "target"
    own.mkdir(parents=True)
    config = json.loads((TINY / "target/config.json").read_text())
    config["text_config"] |= {"hidden_size": MODEL, "intermediate_size": WIDTH}
    (own / "config.json").write_text(json.dumps(config))
    shutil.copy(TINY / "target/generation_config.json", own)
    tensors = mx.load(str(TINY / "target/model.safetensors"))
    assert isinstance(tensors, dict)
    wide = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        shape = [MODEL if n == 64 else n for n in tensor.shape]
        if "mlp." in name:
            shape[1 if "down_proj" in name else 0] = WIDTH
        elif name.endswith("q_proj.weight"):
            shape[0] = tensor.shape[0]
        elif name.endswith("o_proj.weight"):
            shape[1] = tensor.shape[1]
        small = 0.5 * mx.random.normal(shape, key=mx.random.key(i)) / shape[-1] ** 0.5
        wide[name] = small.astype(tensor.dtype)
    mx.save_safetensors(str(own / "model.safetensors"), wide, metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
