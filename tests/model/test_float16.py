"""Activations past float16's largest number: the dtype is named, not the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FIXTURES

from pyengine.checkpoint.pair import Pair, load
from pyengine.engine.score import prompt_logprobs, score
from pyengine.sampling.settings import Sampling

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose weights float16 holds, but not what they make."""
    root = tmp_path_factory.mktemp("large")
    for part in ("target", "assistant"):
        shutil.copytree(FIXTURES / "uni12" / part, root / part)
    file = root / "target" / "model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    for name, tensor in tensors.items():
        if name.endswith("post_attention_layernorm.weight"):
            tensors[name] = tensor * 2e4
    mx.save_safetensors(str(file), tensors, {"format": "pt"})
    return root


def tokens(pair: Pair, block_size: int) -> list[int]:
    rounds = decode(
        pair.target,
        pair.assistant,
        PROMPT,
        sampling=Sampling(temperature=0.0),
        block_size=block_size,
        max_tokens=4,
    )
    return [token for r in rounds for token in r.tokens]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_others_hold_it(folder: Path, dtype: str) -> None:
    pair = load(folder / "target", folder / "assistant", dtype=dtype)
    assert len(tokens(pair, 1)) == 4 and len(prompt_logprobs(pair, PROMPT, 1)) == 2


def test_weights_past_it_are_not_called_damaged(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "target", tmp_path / "target")
    file = tmp_path / "target" / "model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    name = next(name for name in tensors if name.endswith("input_layernorm.weight"))
    mx.save_safetensors(str(file), {**tensors, name: tensors[name] * 1e6}, {"format": "pt"})
    text = (
        r"input_layernorm.weight` must be finite but holds NaN or infinity; float16 ends at 65504"
    )
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "target", dtype="float16")
    for dtype in ("float32", "bfloat16"):
        assert load(tmp_path / "target", dtype=dtype)


def test_float16_is_named_with_the_way_out(folder: Path) -> None:
    pair = load(folder / "target", folder / "assistant", dtype="float16")
    text = (
        r"^\[{}\] logits must be finite but got NaN or infinity; float16 ends at 65504: load the "
        r"pair with dtype bfloat16 or float32\.$"
    )
    for block_size in (1, 3):
        with pytest.raises(RuntimeError, match=text.format("decode")):
            tokens(pair, block_size)
    with pytest.raises(RuntimeError, match=text.format("score")):
        score(pair, PROMPT, [8])
    with pytest.raises(RuntimeError, match=text.format("score")):
        prompt_logprobs(pair, PROMPT, 1)
