"""The embedded pair: complete, small enough, consistent; its page generator writes valid pages."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
from tokenizers import Tokenizer as FastTokenizer

import pyengine

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = Path(pyengine.__file__).parent / "nano"
SCRIPTS = ROOT / "nano"
TARGET_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
}
ASSISTANT_FILES = {"config.json", "generation_config.json", "model.safetensors"}
MAX_BYTES = 12_000_000
# Tells which of the scripts on standard input node cannot read
PARSE = """
const scripts = JSON.parse(require("fs").readFileSync(0, "utf8"));
const bad = (s) => { try { new (require("vm").Script)(s); return false } catch { return true } };
console.log(JSON.stringify(scripts.flatMap((s, i) => bad(s) ? [i] : [])));
"""


def read(name: str) -> dict:
    return json.loads((BUNDLE / name).read_text())


@pytest.fixture(scope="module")
def pair():
    return pyengine.load()


@pytest.fixture(scope="module")
def games():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import game_families
        import games
    finally:
        sys.path.remove(str(SCRIPTS))
    games.game_families = game_families
    return games


def test_bundle_is_complete_and_small():
    assert {p.name for p in (BUNDLE / "target").iterdir()} == TARGET_FILES
    assert {p.name for p in (BUNDLE / "assistant").iterdir()} == ASSISTANT_FILES
    drafter = {p.name: p.stat().st_size for p in (BUNDLE / "dflash").iterdir()}
    assert set(drafter) == {"config.json", "model.safetensors"} and sum(drafter.values()) <= 1 << 20
    assert sum(p.stat().st_size for p in BUNDLE.rglob("*") if p.is_file()) <= MAX_BYTES
    assert "Python Software Foundation" in (BUNDLE / "NOTICE").read_text()
    assert (BUNDLE / "MODEL_CARD.md").is_file()


def test_manifest_and_configs():
    manifest = read("mtplx_pair.json")
    parts = ("target", "assistant", "dflash")
    assert manifest["layout"] == {part: part for part in parts}
    target, assistant = read("target/config.json"), read("assistant/config.json")
    quantization = {"group_size": 64, "bits": 8, "mode": "affine"}
    for config in (target, assistant):
        assert config["quantization"] == config["quantization_config"] == quantization
    for part in parts:
        assert manifest[part]["quantization"] == quantization
    assert target["sliding_window"] == 256 and target["attention_k_eq_v"]
    assert target["num_hidden_layers"] == 24
    assert assistant["backbone_hidden_size"] == target["hidden_size"]
    generation = read("target/generation_config.json")
    sampling = {k: manifest["benchmark"][k] for k in ("temperature", "top_p", "top_k")}
    assert sampling == {k: generation[k] for k in sampling}
    block = manifest["benchmark"]["best_block_size"]
    assert read("assistant/generation_config.json")["num_assistant_tokens"] == block - 1


def test_no_path_of_the_training_machine_is_shipped():
    files = [path for path in BUNDLE.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for path in files:
        data = path.read_bytes()
        assert b"/home/" not in data and b"/opt/" not in data and b"/root/" not in data, path


def test_both_tokenizer_files_agree():
    slow = spm.SentencePieceProcessor(model_file=str(BUNDLE / "target" / "tokenizer.model"))
    fast = FastTokenizer.from_file(str(BUNDLE / "target" / "tokenizer.json"))
    assert fast.get_vocab_size() == slow.vocab_size() == read("target/config.json")["vocab_size"]
    for i in range(slow.vocab_size()):
        assert fast.id_to_token(i) == slow.id_to_piece(i)
    texts = [
        Path(pyengine.__file__).read_text(),
        "",
        " ",
        "\n",
        "na\u00efve \u4e2d\u6587 \U0001f642 e\u0301",
    ]
    texts += ["<|turn>user\nHi<turn|>\n<|turn>model\n", "\t\r\n\x00\x7f\u00a0\u2581"]
    rng = random.Random(0)
    parts = [" ", "    ", "\n", "aa", "__init__", "==", "0123", "\u00e9", "\ud55c", "<turn|>", "\t"]
    texts += ["".join(rng.choices(parts, k=30)) for _ in range(500)]
    for text in texts:
        assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text)


def test_stop_ids_and_turns(pair):
    fast = FastTokenizer.from_file(str(BUNDLE / "target" / "tokenizer.json"))
    stop = [fast.token_to_id(t) for t in ("<eos>", "<turn|>", "<|tool_response>")]
    assert list(pair.generation.stop_ids) == stop
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = pair.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
    )


@pytest.mark.engine
def test_target_knows_python_better_than_chance(pair):
    import mlx.core as mx

    text = "import os\n\n\ndef main():\n    for name in os.listdir('.'):\n        print(name)\n"
    ids = [pair.tokenizer.bos_id, *pair.tokenizer.encode(text)]
    logits = pair.logits(ids)
    loss = mx.logsumexp(logits[:-1], axis=-1) - mx.take_along_axis(
        logits[:-1], mx.array(ids[1:])[:, None], axis=-1
    ).squeeze(-1)
    # 7.15 nats is log(1280), no knowledge at all.
    assert mx.mean(loss).item() < 3.0


def test_assistant_continues_a_page_as_the_target_does(pair, games):
    """Greedy drafts after the middle of an unseen page mostly equal the target's argmax."""
    chat = games.make_game(games_seed := 1_000_003).chat()
    ids = [pair.tokenizer.bos_id, *pair.tokenizer.encode(chat)]
    assert games_seed >= 1_000_000  # no training page has such a seed
    hits, places = 0, range(len(ids) // 3, len(ids) // 3 + 200, 10)
    best = pair.logits(ids[: places[-1]]).argmax(axis=-1).tolist()  # one pass for all places
    for n in places:
        hits += pair.draft(ids[:n], 1)[0] == best[n - 1]
    assert hits >= 0.7 * len(places)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("kind", ["TRAINED", "HELD_BACK"])
def test_generated_pages_parse(games, kind):
    families = getattr(games.game_families, kind)
    pages = [games.make_game(seed, families) for seed in range(24)]
    assert {page.family for page in pages} <= set(families)
    scripts = [games.script_of(page.answer) for page in pages]
    # All in one process: node takes longer to start than to read them
    done = subprocess.run(
        ["node", "-e", PARSE],
        input=json.dumps([*scripts, "let 1;"]),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0 and json.loads(done.stdout) == [len(pages)], done.stderr
    assert games.parses(scripts[0]) and not games.parses("let 1;")


def test_generator_is_deterministic(games):
    text = "".join(games.make_game(seed).chat() for seed in range(50))
    digest = hashlib.sha256(text.encode()).hexdigest()
    recorded = json.loads((SCRIPTS / "data.json").read_text())["first_pages_sha256"]
    assert digest == recorded


def test_families_are_held_back(games):
    assert len(games.TRAINED) >= 8 and "Flappy Bird" in games.TRAINED
    assert len(games.HELD_BACK) == 2 and not set(games.TRAINED) & set(games.HELD_BACK)
