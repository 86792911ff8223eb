"""The same checkpoints in mlx-lm and mlx-vlm: `pytest -m parity`.

    pip install mlx-lm==0.32.2 requests pillow && pip install --no-deps mlx-vlm==0.7.10

mlx-lm knows text-only Gemma 4 targets and multimodal ones; it knows no assistant, mlx-vlm does.
Everything is compared in float32 over the same 8-bit weights.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from in_pages import in_a_row
from models import step, verify

pytest.importorskip("mlx_lm", reason="needs mlx-lm 0.32.2")

import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from tiny_pairs import mirrored, norm

from pyengine.checkpoint.convert import convert
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.quantize import quantize_checkpoint
from pyengine.model.linear import Linear

pytestmark = pytest.mark.parity
FIXTURES = Path(__file__).parents[1] / "fixtures"
EMBEDDED = Path(__file__).parents[2] / "pyengine" / "nano"
needs_embedded = pytest.mark.skipif(
    not (EMBEDDED / MANIFEST).is_file(), reason="the embedded pair is not there"
)
LOGITS = 5e-4
# Where the two best logits are nearer than this, rounding may choose either.
MARGIN = 1e-3
PROMPTS = (
    "Write a single-file HTML5 canvas game of Flappy Bird.",
    "<!DOCTYPE html>\n<html>\n<head>\n<title>Snake</title>",
    "const canvas = document.getElementById('game');\n",
    "function update() {\n  player.x += player.vx;\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "class Node:\n    def __init__(self, value):\n",
    "for i in range(10):\n    print(",
    "The canvas is cleared, then every frame",
)
NUM_TOKENS = 256


def floats(model: nn.Module) -> nn.Module:
    """The model with every floating array in float32."""
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    return model


def gap(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.abs(a - b).max().item())


@pytest.fixture(params=["dense31", "e2b", "moe26"])
def tiny(request, tmp_path):
    """An 8-bit copy of a committed pair; mlx-lm has no text-only class for the unified 12B."""
    for part in ("target", "assistant"):
        quantize_checkpoint(FIXTURES / request.param / part, tmp_path / part)
    config = tmp_path / "target" / "config.json"
    values = json.loads(config.read_text())
    # mlx-lm takes the vocabulary from the top level and otherwise assumes the published one
    values.setdefault("vocab_size", 256)
    config.write_text(json.dumps(values))
    text = mx.load(str(FIXTURES / request.param / "ref.safetensors"))["greedy"].tolist()
    return tmp_path, text


def test_tiny_targets(tiny):
    folder, text = tiny
    theirs, _ = load_model(folder / "target", strict=True)
    ours = load(folder / "target", dtype=mx.float32)
    assert gap(ours.logits(text[:60]), floats(theirs)(mx.array([text[:60]]))[0]) <= LOGITS


@pytest.mark.parametrize("flavour", ["dense31", "e2b", "moe26"])
def test_a_converted_checkpoint_says_the_same_here_and_there(flavour, tmp_path):
    """Hugging Face checkpoint -> convert -> our logits and mlx-lm's, against transformers'.

    The error allowed is computed from the weights: that of the model whose every weight is off by
    the quantisation error with its sign changed (test_convert.py has it without mlx-lm). Twice
    that, or four times where a router may choose another expert, which is no small change.
    """
    src = tmp_path / "src"
    shutil.copytree(FIXTURES / flavour, src)
    config = src / "target" / "config.json"
    config.write_text(json.dumps({"vocab_size": 256, **json.loads(config.read_text())}))
    convert(src, tmp_path / "q")
    wanted = mx.load(str(src / "ref.safetensors"))
    ids, reference = wanted["40.ids"].tolist(), wanted["40.logits"]
    factor = 4 if flavour == "moe26" else 2
    allowed = factor * norm(mirrored(src, tmp_path / "q").logits(ids) - reference)
    ours = load(bundle=tmp_path / "q", dtype=mx.float32).logits(ids)
    theirs, _ = load_model(tmp_path / "q" / "target", strict=True)
    other = floats(theirs)(mx.array([ids]))[0]
    assert gap(ours, other) <= LOGITS
    for logits in (ours, other):
        assert 0 < norm(logits - reference) < allowed


@needs_embedded
def test_embedded_target_writes_the_same_greedy_text():
    """8 prompts x 256 tokens; their cache is fed our token, ours our own."""
    pair = load(dtype=mx.float32)
    theirs, _ = load_model(pair.target_path, strict=True)
    floats(theirs)
    close, worst = [], 0.0
    for number, prompt in enumerate(PROMPTS):
        ids = pair.tokenizer.encode(prompt, bos=True)
        cache, their_cache = pair.target.new_cache(), make_prompt_cache(theirs)
        logits, _ = pair.target.prefill(ids, cache)
        their_logits = theirs(mx.array([ids]), cache=their_cache)[0, -1]
        for position in range(NUM_TOKENS):
            token, their_token = (int(mx.argmax(row).item()) for row in (logits, their_logits))
            worst = max(worst, gap(logits, their_logits))
            if token != their_token:
                top = mx.sort(logits)[-2:]
                margin = float((top[1] - top[0]).item())
                close.append((number, position, token, their_token, margin))
            ids = mx.array([token], dtype=mx.int32)
            rows, _ = verify(pair.target, ids, cache)
            cache.settle(cache.length_limit + 1)
            logits, their_logits = rows[0], theirs(ids[None], cache=their_cache)[0, -1]
            mx.eval(logits, their_logits)
    print(f"largest logit gap {worst:.2e}; positions where the choice differs: {close}")
    assert all(margin < MARGIN for *_, margin in close)


def their_assistant(folder: Path) -> nn.Module:
    """mlx-vlm's assistant with the weights of a folder, strictly."""
    pytest.importorskip("mlx_vlm", reason="needs mlx-vlm 0.7.10")
    from mlx_vlm.speculative.drafters.gemma4_assistant.config import Gemma4AssistantConfig
    from mlx_vlm.speculative.drafters.gemma4_assistant.gemma4_assistant import (
        Gemma4AssistantDraftModel,
    )

    config = json.loads((folder / "config.json").read_text())
    model = Gemma4AssistantDraftModel(Gemma4AssistantConfig.from_dict(config))
    weights = model.sanitize(mx.load(str(folder / "model.safetensors")))
    block = config.get("quantization")
    if block is not None:
        nn.quantize(
            model,
            group_size=block["group_size"],
            bits=block["bits"],
            class_predicate=lambda path, _: f"{path}.scales" in weights,
        )
    model.load_weights(list(weights.items()), strict=True)
    return floats(model)


def compare_assistants(target: Path, assistant: Path, ids: list[int]) -> None:
    """Four steps from the same keys, values and inputs, at both positions."""
    theirs = their_assistant(assistant)
    for position in ("n-1", "n-2"):
        pair = load(target, assistant, dtype=mx.float32, position=position)
        model, cache = pair.target, pair.target.new_cache()
        n = len(ids)
        logits, hidden = model.prefill(ids, cache := model.new_cache())
        shared = {}
        for kind, sliding in (("sliding_attention", True), ("full_attention", False)):
            source = model.config.last_source(sliding)
            first = max(n - (model.config.window - 1), 0) if sliding else 0
            shared[kind] = tuple(a[:, :, first:n] for a in in_a_row(cache, source))
        theirs.bind(FakeTarget())
        theirs._kv_valid_len = n
        at = mx.array([[n if position == "n-1" else n - 1]])
        token = mx.argmax(logits, keepdims=True).astype(mx.int32)
        for _ in range(4):
            embedding = model.embed(token)
            x = mx.concatenate([embedding, hidden], axis=-1)[None]
            their_hidden, their_logits = theirs(x, shared, at)
            logits, hidden = step(pair.assistant, embedding, hidden, cache)
            seen = mx.isfinite(logits)
            ours, other = mx.where(seen, logits, 0), mx.where(seen, their_logits[0], 0)
            assert gap(ours, other) <= LOGITS
            assert gap(hidden, their_hidden[0]) <= LOGITS
            token = mx.argmax(logits, axis=-1).astype(mx.int32)


class FakeTarget:
    """bind() only looks for an embedding table; inputs are given ready made."""


@pytest.mark.parametrize("flavour", ["dense31", "moe26"])
def test_tiny_assistants(flavour, tmp_path):
    for part in ("target", "assistant"):
        quantize_checkpoint(FIXTURES / flavour / part, tmp_path / part)
    compare_assistants(tmp_path / "target", tmp_path / "assistant", list(range(5, 35)))


def test_tiny_assistant_with_centroids():
    """Unquantised: mlx-vlm 0.7.10 gathers packed words where this table is quantised."""
    folder = FIXTURES / "e2b"
    compare_assistants(folder / "target", folder / "assistant", list(range(5, 35)))


@needs_embedded
def test_embedded_assistant():
    ids = load().tokenizer.encode(PROMPTS[0] * 20, bos=True)[:400]
    compare_assistants(EMBEDDED / "target", EMBEDDED / "assistant", ids)


def test_our_linear_agrees_with_theirs():
    """Both sides read the same packed words the same way."""
    w = mx.random.normal((64, 128), key=mx.random.key(1))
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 64, bias=False), 64, 8)
    layer.weight, layer.scales, layer.biases = mx.quantize(w, 64, 8)
    x = mx.random.normal((3, 128), key=mx.random.key(2))
    ours = Linear(layer.weight, layer.scales, layer.biases, 8, 64)(x)
    np.testing.assert_allclose(np.array(ours), np.array(layer(x)), rtol=1e-4, atol=1e-4)
