"""Live comparison with transformers on tiny pairs made here: `pytest -m parity`.

The committed fixtures freeze the same comparison at smaller shapes; this one needs the parity extra
(torch, transformers 5.22.2) and shows that they still say what transformers says.
"""

import mlx.core as mx
import models
import numpy as np
import pytest
from in_pages import in_a_row
from models import verify

pytest.importorskip("torch", reason="needs the parity extra: torch")
pytest.importorskip("transformers", reason="needs the parity extra: transformers")

import make_tiny
import torch
import transformers
from safetensors.torch import load_file

from pyengine import ops
from pyengine.checkpoint.pair import load

pytestmark = pytest.mark.parity
FLOAT32 = 5e-4
# In bfloat16 the two round at different places, so they are compared by their distance from the
# float32 logits: ours (root mean square over all positions) may be at most this multiple of theirs.
BFLOAT16_RATIO = 1.25
POSITIONS = ("n-1", "n-2")


@pytest.fixture(scope="module", params=make_tiny.FLAVOURS)
def tiny(request, tmp_path_factory):
    """(folder, transformers target, references) of one flavour."""
    flavour = request.param
    folder = tmp_path_factory.mktemp(flavour)
    torch.set_num_threads(1)
    # The form that the committed fixture of this flavour does not have
    multimodal = flavour in ("moe26", "uni12")
    target, _ = make_tiny.make(flavour, folder, multimodal=multimodal, fitted=False)
    return folder, target, load_file(folder / "ref.safetensors")


@pytest.fixture(scope="module")
def pairs(tiny):
    folder = tiny[0]
    return {
        position: load(folder / "target", folder / "assistant", dtype=mx.float32, position=position)
        for position in POSITIONS
    }


def gap(ours: mx.array, theirs: torch.Tensor) -> float:
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(np.array(ours, dtype=np.float64) - theirs.double().numpy()).max())


def test_version():
    assert transformers.__version__ == "5.22.2"


@pytest.mark.parametrize("length", make_tiny.PROMPTS)
def test_logits(tiny, pairs, length):
    wanted = tiny[2]
    logits = pairs["n-1"].logits(wanted[f"{length}.ids"].tolist())
    worst = gap(logits, wanted[f"{length}.logits"])
    print(f"{tiny[0].name} length {length}: logits within {worst:.2e}")
    assert worst <= FLOAT32


def test_layers_and_keys(tiny, pairs, monkeypatch):
    wanted, model = tiny[2], pairs["n-1"].target
    streams = []
    residual_norm = ops.residual_norm

    def spy(*args, **kwargs):
        out = residual_norm(*args, **kwargs)
        if kwargs.get("scalar") is not None:
            streams.append(out[0])
        return out

    monkeypatch.setattr(ops, "residual_norm", spy)
    cache = model.new_cache()
    _, hidden = verify(model, mx.array(wanted["21.ids"].numpy(), dtype=mx.int32), cache)
    for i, stream in enumerate(streams[:-1], 1):
        assert gap(stream, wanted[f"21.layer.{i}"]) <= FLOAT32, f"layer {i}"
    assert gap(hidden, wanted["21.hidden"]) <= FLOAT32
    for kind, sliding in ((make_tiny.SLIDING, True), (make_tiny.FULL, False)):
        source = model.config.last_source(sliding)
        for name, kept in zip("kv", in_a_row(cache, source), strict=True):
            assert gap(kept[:, :, :21], wanted[f"21.kv.{kind}.{name}"]) <= FLOAT32


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("length", make_tiny.PROMPTS)
def test_drafts(tiny, pairs, length, position):
    """Every step from the reference's own input; the tokens from one chain of ours."""
    wanted, pair = tiny[2], pairs[position]
    ids = wanted[f"{length}.ids"].tolist()
    cache = pair.target.new_cache()
    pair.target.prefill(ids, cache, chunk=7)
    worst = 0.0
    for step in range(make_tiny.NUM_DRAFTS):
        at = f"{length}.{position}.{step}"
        embedding, hidden = (
            mx.array(wanted[f"{at}.{name}"].numpy()) for name in ("embedding", "hidden_in")
        )
        logits, hidden = models.step(pair.assistant, embedding, hidden, cache)
        seen = np.isfinite(np.array(logits))
        theirs = np.where(seen, wanted[f"{at}.logits"].numpy(), 0)
        ours = np.where(seen, np.array(logits), 0)
        worst = max(worst, float(np.abs(ours - theirs).max()))
        worst = max(worst, gap(hidden, wanted[f"{at}.hidden"]))
    print(f"{tiny[0].name} length {length} {position}: drafts within {worst:.2e}")
    assert worst <= FLOAT32
    drafts = pair.draft(ids + wanted[f"{length}.bonus"].tolist(), make_tiny.NUM_DRAFTS)
    tokens = [int(wanted[f"{length}.{position}.{i}.token"]) for i in range(make_tiny.NUM_DRAFTS)]
    assert drafts == tokens


def test_greedy_text(tiny, pairs):
    text = tiny[2]["greedy"].tolist()
    logits = pairs["n-1"].logits(text[:-1])
    top = mx.sort(logits, axis=-1)[:, -2:]
    margin = np.array(top[:, 1] - top[:, 0])[20:]
    differ = np.array(mx.argmax(logits, axis=-1))[20:] != np.array(text[21:])
    assert not (differ & (margin >= 1e-3)).any()


def test_bfloat16(tiny):
    folder, _, wanted = tiny
    family = transformers.AutoModelForCausalLM
    if (folder / "target" / "config.json").read_text().find('"text_config"') >= 0:
        family = transformers.AutoModelForImageTextToText
    theirs_model = family.from_pretrained(folder / "target", dtype=torch.bfloat16).eval()
    ours_model = load(folder / "target", folder / "assistant")
    assert ours_model.target.dtype == mx.bfloat16
    errors: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for length in make_tiny.PROMPTS:
        ids = wanted[f"{length}.ids"]
        exact = wanted[f"{length}.logits"].double().numpy()
        with torch.no_grad():
            theirs = theirs_model(input_ids=ids[None]).logits[0].double().numpy()
        ours = np.array(ours_model.logits(ids.tolist()), dtype=np.float64)
        errors["theirs"].append((theirs - exact).ravel())
        errors["ours"].append((ours - exact).ravel())
    rms = {who: float(np.sqrt((np.concatenate(e) ** 2).mean())) for who, e in errors.items()}
    worst = {who: float(np.abs(np.concatenate(e)).max()) for who, e in errors.items()}
    print(f"{folder.name} bfloat16 against float32: rms {rms}, largest {worst}")
    assert rms["ours"] <= BFLOAT16_RATIO * rms["theirs"]
