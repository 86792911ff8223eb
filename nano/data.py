"""Corpus, tokenizer and packed token ids for the embedded pair.

    python nano/data.py RUN

Writes RUN/tokenizer.model, RUN/{games,python}.{train,held}.npy, RUN/families.held.npy (uint16 ids,
every document `<bos>` ... `<eos>`) and RUN/data.json: what went in, with hashes. Text: generated
games (games.py) and the standard library of the running interpreter without its tests.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import random
import sysconfig
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
from game_families import HELD_BACK, TRAINED
from games import make_game, make_mixture

VOCAB = 1280
NUM_GAMES, NUM_HELD = 4000, 120
# Seeds of pages that no training page shares.
HELD_SEED, HELD_FAMILY_SEED, MIXTURE_SEED = 1_000_000, 2_000_000, 3_000_000
NUM_MIXTURES = 1500
PAD, EOS, BOS, UNK = 0, 1, 2, 3
CONTROL = {"pad_id": PAD, "eos_id": EOS, "bos_id": BOS, "unk_id": UNK}
CONTROL |= {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"}
SPECIAL = ["<mask>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"]
SPECIAL += ["<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>"]
SPECIAL += ["<|channel>", "<channel|>", "<|turn>", "<turn|>"]
# Newlines and indents are pieces of their own: BPE over runs of one character would depend on
# the implementation's order of equal merges.
LAYOUT = ["\n", "\n\n", *("\u2581" * n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16))]
SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
SKIPPED |= {"lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
# Share of training rows that begin where a document begins.
AT_START = {"games": 0.5, "python": 0.25}


def stdlib_files() -> dict[str, str]:
    """Path to text, tests and tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED & set(parts) or parts[0].startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > 400 and "\ufffd" not in text:
            files["/".join(parts)] = text
    return files


def is_held(path: str) -> bool:
    """Whole top-level modules are held back, chosen by the hash of their name."""
    module = path.split("/")[0].removesuffix(".py")
    return hashlib.sha256(module.encode()).digest()[0] < 14


def held_texts(kind: str, count: int) -> list[str]:
    """Text that no model was trained on: "games", "families" or, whatever the count, "python"."""
    if kind == "games":
        return [make_game(HELD_SEED + i).chat() for i in range(count)]
    if kind == "families":
        return [make_game(HELD_FAMILY_SEED + i, HELD_BACK).chat() for i in range(count)]
    recorded = json.loads((Path(__file__).parent / "data.json").read_text())["stdlib"]["held_back"]
    files = {path: text for path, text in stdlib_files().items() if is_held(path)}
    if {p: hashlib.sha256(t.encode()).hexdigest() for p, t in files.items()} != recorded:
        print("note: this interpreter's library is not the recorded one (data.json)")
    return list(files.values())


def train_tokenizer(path: Path, texts: list[str]) -> spm.SentencePieceProcessor:
    model = io.BytesIO()
    lines = [line for text in texts for line in text.split("\n") if line]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=SPECIAL + LAYOUT,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.9995,
        max_sentence_length=8192,
        num_threads=1,
        minloglevel=2,
        **CONTROL,
    )
    path.write_bytes(model.getvalue())
    return spm.SentencePieceProcessor(model_file=str(path))


def pack(sp: spm.SentencePieceProcessor, texts: list[str]) -> np.ndarray:
    rows = [[BOS, *ids, EOS] for ids in sp.encode(texts)]
    return np.concatenate([np.array(row, np.uint16) for row in rows])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build(run: Path) -> dict:
    run.mkdir(parents=True, exist_ok=True)
    files = stdlib_files()
    texts = {
        "games.train": [make_game(s).chat() for s in range(NUM_GAMES)],
        "games.held": [make_game(HELD_SEED + s).chat() for s in range(NUM_HELD)],
        "families.held": [
            make_game(HELD_FAMILY_SEED + s, HELD_BACK).chat() for s in range(NUM_HELD)
        ],
        "python.train": [t for p, t in files.items() if not is_held(p)],
        "python.held": [t for p, t in files.items() if is_held(p)],
        "mixtures.train": [make_mixture(MIXTURE_SEED + s).chat() for s in range(NUM_MIXTURES)],
    }
    shuffled = random.Random(0).sample(texts["python.train"], len(texts["python.train"]) // 2)
    sp = train_tokenizer(run / "tokenizer.model", texts["games.train"][:1500] + shuffled)
    report = {
        "python": platform.python_version(),
        "vocab": sp.vocab_size(),
        "tokenizer_sha256": sha256((run / "tokenizer.model").read_bytes()),
        "first_pages_sha256": sha256("".join(texts["games.train"][:50]).encode()),
        "families": {"trained": list(TRAINED), "held_back": list(HELD_BACK)},
        "parts": {},
        "stdlib": {
            "held_back": {p: sha256(t.encode()) for p, t in files.items() if is_held(p)},
            "trained": {p: sha256(t.encode()) for p, t in files.items() if not is_held(p)},
        },
    }
    for name, part in texts.items():
        ids = pack(sp, part)
        np.save(run / f"{name}.npy", ids)
        report["parts"][name] = {
            "documents": len(part),
            "tokens": len(ids),
            "characters": sum(map(len, part)),
            "sha256": sha256(ids.tobytes()),
        }
    (run / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


class Rows:
    """Random rows of packed ids, some of them at the start of a document."""

    kinds: tuple[str, ...] = ("games", "python")

    def __init__(self, run: Path, part: str, seed: int, extra: tuple[str, ...] = ()):
        kinds = self.kinds + extra
        self.ids = {kind: np.load(run / f"{kind}.{part}.npy") for kind in kinds}
        self.starts = {kind: np.nonzero(ids == BOS)[0] for kind, ids in self.ids.items()}
        self.vocab = json.loads((run / "data.json").read_text())["vocab"]
        self.random = np.random.default_rng(seed)

    def draw(self, kind: str, count: int, T: int, at_start: float) -> torch.Tensor:
        """[count, T + 1]"""
        ids, rows = self.ids[kind], []
        for _ in range(count):
            if self.random.random() < at_start:
                first = int(self.random.choice(self.starts[kind]))
            else:
                first = int(self.random.integers(len(ids)))
            first = min(first, len(ids) - T - 1)
            rows.append(ids[first : first + T + 1])
        return torch.from_numpy(np.array(rows, np.int64).reshape(count, T + 1))

    def batch(self, count: int, T: int, games: float) -> torch.Tensor:
        num_games = int((self.random.random(count) < games).sum())
        counts = {"games": num_games, "python": count - num_games}
        return torch.cat([self.draw(k, n, T, AT_START[k]) for k, n in counts.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    report = build(parser.parse_args().run)
    for name, part in report["parts"].items():
        print(name, part, f"{part['characters'] / part['tokens']:.2f} characters per token")
    print("held back:", *report["stdlib"]["held_back"])


if __name__ == "__main__":
    main()
