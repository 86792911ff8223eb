"""A small real tokenizer in both file forms, and a pair that speaks a script."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import sentencepiece
import tokenizers

from pyengine.model.cache import Placed
from pyengine.model.pages import Pages
from pyengine.model.target import Part, Processed, Reader
from pyengine.text.tokenizer import Tokenizer

MARKS = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", '<|"|>', "<|think|>"]
WORDS = "the quick brown fox jumps over a lazy dog; print(value) if total > 0 else return None"

# Roles become turns, system text and thoughts as in Gemma 4's own template; written for the tests.
TEMPLATE = """\
{{ bos_token }}
{%- if enable_thinking %}{{ '<|turn>system\n<|think|>think<turn|>\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'developer' %}{% continue %}{% endif %}
    {%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' ~ m.role) }}
    {%- endif %}
    {{- '<|turn>' ~ ('model' if m.role == 'assistant' else m.role) }}
    {{- '\\n' }}
    {%- if m.content is string %}{{ m.content.split('<channel|>')[-1] | trim }}
    {%- else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
    {{- '<turn|>\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}
"""


def write_tokenizers(directory: Path) -> None:
    """tokenizer.model, an equal tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, WORDS.title(), "  " + WORDS] * 20),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*MARKS, "\n", "\n\n", "<table>"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    (directory / "tokenizer.json").write_text(
        as_tokenizer_json(directory / "tokenizer.model"), encoding="utf-8"
    )
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "add_bos_token": True}
    config["extra_special_tokens"] = ["<|think|>"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def as_tokenizer_json(model: Path) -> str:
    """The same vocabulary and merges in the other form, as Gemma's tokenizer.json has them."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {library.id_to_piece(i): i for i in range(library.vocab_size())}
    merges = [
        (rank, (piece[:i], piece[i:]))
        for piece, rank in vocab.items()
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab and not piece.startswith(("<", "\n"))
    ]
    out = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab,
            merges=[pair for _, pair in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    out.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    out.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    out.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *MARKS]
    out.add_special_tokens([tokenizers.AddedToken(s, normalized=False) for s in special])
    plain = ["\n", "\n\n", "<table>"]
    out.add_tokens([tokenizers.AddedToken(s, normalized=False) for s in plain])
    return out.to_str()


class NoArena:
    """An arena of sequences that store nothing. ``new_cache`` makes one."""

    arrays: ClassVar[list[mx.array]] = []
    nbytes = held_bytes = 0
    window = 0
    beside: ClassVar[tuple[Any, ...]] = ()

    def __init__(self, new_cache: Callable[[], LengthCache]) -> None:
        self.new_cache = new_cache
        self.full, self.sliding = Pages(0), Pages(0)

    def page_bytes(self, sliding: bool) -> int:
        return 1

    def pages(self, sliding: bool) -> Pages:
        return self.sliding if sliding else self.full

    def spare(self, sliding: bool) -> bool:
        return False

    def rest(self) -> None:
        raise RuntimeError("a script is a constant of what was recorded: none for the next text")

    def resume(self, length: int, full: list[int], sliding: dict[int, int]) -> LengthCache:
        assert not (length or full or sliding)
        return self.new_cache()

    def place(self, caches: Sequence[LengthCache]) -> Placed:
        lengths = mx.array([cache.length_limit for cache in caches], dtype=mx.int32)
        return Placed([], lengths, lengths, lengths, lengths)

    def with_placed(self, placed: Placed) -> NoArena:
        return self

    def take_results(self, arrays: list[mx.array]) -> None:
        assert not arrays


class LengthCache:
    """A cache that stores nothing but lengths: the prompt's, and its own. ``on_round`` hears the
    size of each block."""

    nbytes = 4
    full: ClassVar[list[int]] = []
    sliding: ClassVar[dict[int, int]] = {}

    def __init__(self, on_round: Callable[[int], None] = lambda rows: None) -> None:
        self.length, self.length_limit = mx.array(0, mx.int32), 0
        self.prompt = mx.array(0, mx.int32)
        self.reserve = on_round
        self.arena = NoArena(lambda: LengthCache(on_round))

    @property
    def state(self) -> list[mx.array]:
        return [self.prompt, self.length]

    @property
    def committed(self) -> int:
        return self.length_limit

    def growth(self, count: int) -> int:
        return 0

    def commit(self, count: mx.array, length_limit: int) -> None:
        self.length, self.length_limit = self.length + count, length_limit

    def settle(self, length: int) -> None:
        self.length_limit = length

    def with_state(self, state: list[mx.array], arena: NoArena, place: int) -> LengthCache:
        other = LengthCache()
        other.take_results(state, self.length_limit)
        return other

    def take_results(self, state: list[mx.array], length_limit: int) -> None:
        self.prompt, self.length = state
        self.length_limit = length_limit

    def can_fork(self, length: int) -> bool:
        return False  # no prefix takes it up again

    def fork(self, length: int) -> LengthCache:
        other = LengthCache(self.reserve)
        other.take_results(self.state, length)
        return other

    def release(self) -> None:
        pass


@functools.cache
def logits_of(script: tuple[int, ...], vocab: int) -> mx.array:
    """Of every place in a script. Made once: a Ctrl-C amid ``mx.array(...)`` would be lost."""
    rows = mx.array(np.eye(vocab, dtype=np.float32)[list(script)] * 60)
    mx.eval(rows)
    return rows


class ScriptTarget:
    """Says ``script`` after any prompt, nearly certain of every token.

    After ``held_after`` rounds of an answer each waits until ``go_on`` is set, or for Ctrl-C.
    """

    dtype = mx.float32
    waiting = staticmethod(nullcontext)  # for nobody

    def __init__(self, script: list[int], vocab: int, context: int, held_after: int | None) -> None:
        self.script, self.context, self.held_after = script, context, held_after
        self.go_on = threading.Event()
        mode = SimpleNamespace(bits=8, group_size=64, overrides={"layers.0.mlp": None})
        self.config = SimpleNamespace(vocab_size=vocab, quantization=mode)
        self.before_call: Callable[[int], None] = lambda rows: None
        self.prompt: list[int] = []

    @property
    def rows(self) -> mx.array:
        return logits_of(tuple(self.script), self.config.vocab_size)

    def embed(self, ids: mx.array) -> mx.array:
        return ids.astype(mx.float32)[:, None]

    def new_cache(self) -> LengthCache:
        rounds = 0

        def on_round(rows: int) -> None:
            nonlocal rounds
            rounds += 1
            self.before_call(rows)
            if self.held_after is not None and rounds > self.held_after:
                while not self.go_on.wait(0.1):  # so that a Ctrl-C just before it is noticed
                    pass

        return LengthCache(on_round)

    def new_arena(self, *, sequences: int = 1) -> NoArena:
        return NoArena(self.new_cache)

    def prompt_bytes(self, tokens: int, block_size: int, marks: int, beside: Any = ()) -> int:
        return 0

    def prefill(
        self, ids: list[int], cache: LengthCache, *, reader: Reader | None = None
    ) -> tuple[mx.array, mx.array]:
        self.prompt = list(ids)
        cache.prompt = mx.array(len(ids), mx.int32)
        cache.commit(mx.array(len(ids), mx.int32), len(ids))
        hidden = mx.zeros((1, 1), mx.int32)
        if reader is not None:
            reader.read([reader], [Processed(hidden, mx.array(0, mx.int32), cache)])
        return self.rows[0], hidden

    def prefill_together(self, parts: Sequence[Part]) -> list[tuple[mx.array, mx.array]]:
        return [self.prefill(ids, cache, reader=reader) for ids, cache, reader in parts]  # type: ignore[arg-type]

    def forward(
        self, ids: list[mx.array], caches: list[LengthCache], taps: tuple[int, ...] = ()
    ) -> tuple[mx.array, mx.array]:
        firsts = [cache.length - cache.prompt + 1 for cache in caches]
        places = mx.concatenate(
            [first + mx.arange(own.size) for first, own in zip(firsts, ids, strict=True)]
        )
        return self.rows[places % len(self.script)], places[:, None]


class ScriptAssistant:
    """Knows the script but for every third token."""

    position = "n-1"

    def __init__(self, target: ScriptTarget) -> None:
        self.target = target
        self.config = SimpleNamespace(quantization=None)

    def forward(
        self, embedding: mx.array, hidden: mx.array, caches: list[LengthCache]
    ) -> tuple[mx.array, mx.array]:
        place = hidden + 1
        rows = self.target.rows[place[0] % len(self.target.script)]
        return mx.where(place % 3 == 0, mx.roll(rows, 1, axis=-1), rows), place


def script_pair(
    tokenizer: Tokenizer,
    script: str | Sequence[int],
    *,
    context: int = 4096,
    held_after: int | None = None,
    **changes: Any,
) -> Any:
    """A pair that answers every prompt with ``script`` and then ``<turn|>``."""
    stop = tokenizer.id_of("<turn|>")
    assert stop is not None
    tokens = tokenizer.encode(script) if isinstance(script, str) else list(script)
    target = ScriptTarget([*tokens, stop], tokenizer.vocab_size, context, held_after)
    fields = {
        "target": target,
        "assistant": ScriptAssistant(target),
        "dflash": None,
        "tokenizer": tokenizer,
        "generation": SimpleNamespace(
            stop_ids=(1, stop),
            temperature=1.0,
            top_p=0.95,
            top_k=64,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            suppress_tokens=(),
            num_draft=None,
        ),
        "manifest": {},
        "name": "scripted",
        "path": Path("nowhere"),
        "verified": False,
        "embedded": False,
    }
    return SimpleNamespace(**{**fields, **changes})


def saying(tokenizer: Tokenizer, *scripts: str) -> Any:
    """A pair that answers its prompts with one script after another; ``heard`` are the prompts."""
    pair = script_pair(tokenizer, scripts[0], heard=[])
    ends = [script_pair(tokenizer, script).target.script for script in scripts]
    whole = pair.target.prefill

    def prefill(ids: list[int], cache: LengthCache, *, reader: Reader | None = None) -> Any:
        pair.heard.append("".join(map(tokenizer.spelling, ids)))
        pair.target.script = ends[min(len(pair.heard), len(ends)) - 1]
        return whole(ids, cache, reader=reader)

    pair.target.prefill = prefill
    return pair
