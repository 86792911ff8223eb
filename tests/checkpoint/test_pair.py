"""Finding, checking and loading the two halves; what a pair answers on its own."""

import json
import shutil

import mlx.core as mx
import pytest
from tiny_pairs import FIXTURES, FLAVOURS, gap, reference, tiny_pair

from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.pair import load


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def bundle(tmp_path):
    """A bundle under its own root, so that a path out of it stays in the test's folder."""
    root = tmp_path / "root" / "bundle"
    shutil.copytree(FIXTURES / "uni12", root)
    (root / MANIFEST).write_text(json.dumps({"name": "tiny", "variant": "uni12"}))
    return root


def test_two_folders():
    pair = load(FIXTURES / "e2b" / "target", str(FIXTURES / "e2b" / "assistant"))
    assert pair.target.dtype == pair.assistant.dtype == mx.bfloat16
    assert pair.path == pair.target_path == FIXTURES / "e2b" / "target"
    assert (pair.verified, pair.embedded, pair.manifest) == (False, False, {})


def test_a_target_alone():
    pair = load(FIXTURES / "dense31" / "target")
    assert pair.assistant is None and pair.generation.num_draft is None
    assert pair.logits([5, 6]).shape == (2, 256)
    with pytest.raises(ValueError, match=r"\[draft\] the pair must have an assistant"):
        pair.draft([5, 6], 1)


def test_a_bundle(bundle):
    pair = load(bundle=bundle)
    assert (pair.name, pair.path, pair.embedded) == ("tiny", bundle, False)
    assert pair.target_path == bundle / "target" and pair.manifest["variant"] == "uni12"
    (bundle / "target").rename(bundle / "big")
    (bundle / MANIFEST).write_text(json.dumps({"layout": {"target": "big"}}))
    assert load(bundle=bundle).target_path == bundle / "big"


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/tmp", "C:\\x", "..\\x", "..", 7, ""]
)
def test_a_bundle_does_not_reach_outside(bundle, name):
    shutil.copytree(bundle / "target", bundle.parent / "outside")
    (bundle / MANIFEST).write_text(json.dumps({"layout": {"target": name}}))
    with pytest.raises(ValueError, match=r"\[load\] `layout.target` of mtplx_pair.json must"):
        load(bundle=bundle)


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(ValueError, match=r"must be a bundle but is a checkpoint; it goes to targ"):
        load(bundle=FIXTURES / "uni12" / "target")
    with pytest.raises(ValueError, match=r"\[load\] bundle must be a folder but got"):
        load(bundle=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"\[load\] target must be a folder but got"):
        load(tmp_path / "nothing")
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"mtplx_pair\.json must be JSON but is not"):
        load(bundle=tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"\[load\] target must be a folder but got .*target"):
        load(bundle=tmp_path)


def test_arguments_that_do_not_go_together():
    target, assistant = FIXTURES / "uni12" / "target", FIXTURES / "uni12" / "assistant"
    with pytest.raises(ValueError, match="bundle must stand alone"):
        load(target, bundle=FIXTURES)
    with pytest.raises(ValueError, match="assistant must come with a target"):
        load(assistant=assistant)
    with pytest.raises(ValueError, match=r"\[load\] position must be n-1 or n-2 but got 'n'"):
        load(target, assistant, position="n")
    with pytest.raises(ValueError, match=r"\[load\] dtype must be float32, .* but got .*int32"):
        load(target, assistant, dtype=mx.int32)


def test_halves_of_different_pairs_are_refused():
    with pytest.raises(ValueError, match="sliding key/value heads must equal the target's 1"):
        load(FIXTURES / "e2b" / "target", FIXTURES / "uni12" / "assistant")
    with pytest.raises(ValueError, match=r"`model_type` must be one of gemma4_assistant"):
        load(FIXTURES / "uni12" / "target", FIXTURES / "uni12" / "target")
    with pytest.raises(ValueError, match=r"`model_type` must be one of gemma4,"):
        load(FIXTURES / "uni12" / "assistant", FIXTURES / "uni12" / "assistant")


def test_halves_of_different_dtype_are_refused(bundle):
    weights = mx.load(str(bundle / "assistant" / "model.safetensors"))
    wide = {name: a.astype(mx.float32) for name, a in weights.items()}
    mx.save_safetensors(str(bundle / "assistant" / "model.safetensors"), wide)
    with pytest.raises(ValueError, match=r"assistant's dtype must equal .*; pass dtype="):
        load(bundle=bundle)
    assert load(bundle=bundle, dtype=mx.float32).target.dtype == mx.float32


def test_generation_defaults_come_in_order(bundle):
    file = bundle / "target" / "generation_config.json"
    file.write_text(
        json.dumps({"temperature": 0.7, "eos_token_id": [1, 106, 50], "suppress_tokens": [200, 3]})
    )
    benchmark = {"temperature": 0.1, "top_p": 0.8, "best_block_size": 6}
    (bundle / MANIFEST).write_text(json.dumps({"benchmark": benchmark}))
    found = load(bundle=bundle).generation
    assert (found.temperature, found.top_p, found.top_k) == (0.7, 0.8, 64)
    assert found.stop_ids == (1, 106, 50) and found.suppress_tokens == (200, 3)
    assert found.num_draft == 4

    file.unlink()
    (bundle / MANIFEST).write_text("{}")
    (bundle / "assistant" / "generation_config.json").unlink()
    found = load(bundle=bundle).generation
    assert (found.temperature, found.top_p, found.top_k) == (1.0, 0.95, 64)
    assert found.stop_ids == (1,) and found.suppress_tokens == ()  # eos of config.json
    assert found.num_draft is None


@pytest.mark.parametrize(
    "values, message",
    [
        ({"eos_token_id": [256]}, "`eos_token_id` .* must hold ids from 0 to 255 but got"),
        ({"suppress_tokens": ["x"]}, "`suppress_tokens` .* must hold ids from 0 to 255"),
        ({"temperature": -1}, "default temperature must be 0 or more but got -1"),
        ({"top_p": "high"}, "default top_p must be a number but got 'high'"),
    ],
)
def test_senseless_defaults_are_refused(bundle, values, message):
    (bundle / "target" / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load(bundle=bundle)


@pytest.mark.parametrize("position", ["n-1", "n-2"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_drafts_match_transformers(flavour, position):
    wanted = reference(flavour)
    pair = tiny_pair(flavour, position=position)
    for length in (5, 21, 40):
        ids = wanted[f"{length}.ids"].tolist() + wanted[f"{length}.bonus"].tolist()
        theirs = [int(wanted[f"{length}.{position}.{step}.token"].item()) for step in range(4)]
        assert pair.draft(ids, 4) == theirs
        assert gap(pair.logits(ids[:-1]), wanted[f"{length}.logits"]) <= 5e-4


def test_the_assistants_are_sometimes_right():
    """The fixtures exercise partial acceptance: some drafts are the text that follows, some not."""
    for flavour in FLAVOURS:
        text, pair = reference(flavour)["greedy"].tolist(), tiny_pair(flavour)
        right = []
        for at in range(25, 65, 4):
            drafts = pair.draft(text[: at + 1], 4)
            follows = [a == b for a, b in zip(drafts, text[at + 1 :], strict=False)]
            right.append(([*follows, False]).index(False))
        assert 0 in right and max(right) >= 3, (flavour, right)


def test_errors():
    pair = tiny_pair("uni12")
    with pytest.raises(ValueError, match=r"\[logits\] ids must not be empty"):
        pair.logits([])
    with pytest.raises(ValueError, match=r"\[logits\] ids must be from 0 to 255 but got 256"):
        pair.logits([256])
    with pytest.raises(ValueError, match=r"\[logits\] ids must fit the context of 512 tokens"):
        pair.logits([1] * 513)
    with pytest.raises(ValueError, match=r"\[draft\] ids must hold at least 2 tokens but got 1"):
        pair.draft([1], 1)
    with pytest.raises(ValueError, match=r"\[draft\] k must be at least 1 but got 0"):
        pair.draft([1, 2], 0)
    with pytest.raises(ValueError, match=r"\[draft\] ids must be from 0 to 255 but got -1"):
        pair.draft([1, -1], 2)


def test_a_missing_tokenizer_is_told_before_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    target = FIXTURES / "dense31" / "target"
    assert "tokenizer" not in vars(load(target))
    monkeypatch.setattr("pyengine.checkpoint.pair.load_target_weights", None)
    with pytest.raises(ValueError, match=r"must hold tokenizer\.json or tokenizer\.model"):
        load(target, text=True)
    monkeypatch.undo()
    assert "tokenizer" in vars(load(text=True))
