"""Grammars compiled for one vocabulary, and kept: the one place that knows llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pyengine.grammar.asked import Source, check_installed
from pyengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from pyengine.checkpoint.pair import Pair

T = TypeVar("T")

MOST_KEPT = 32  # compiled grammars per vocabulary
# The library descends once per rule that leads to a rule, in what a text of MAX_BYTES can spell
STACK = 64 << 20
# As Python's json writes it. Where white space is free, a text of small probability never ends
JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar: what the matchers of its texts begin with.

    Attributes:
        first: A matcher that has seen nothing; copied for each text, never moved.
        stop_ids: Ids that end a text; the first is the one that ends it where nothing else may
            follow.
        vocab: V.
    """

    first: LLMatcher
    stop_ids: tuple[int, ...]
    vocab: int

    @property
    def words(self) -> int:
        """Numbers of 32 bits that a mask of the vocabulary takes."""
        return -(-self.vocab // 32)


class Vocabulary:
    """A pair's vocabulary as llguidance wants it, and the grammars compiled for it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, stop_ids: tuple[int, ...]) -> None:
        self._stop_ids, self._vocab = stop_ids, vocab
        self._library = _library_tokenizer(tokenizer, vocab, stop_ids)
        self._kept: OrderedDict[Source, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, source: Source) -> Grammar:
        """The grammar of a source; from memory where it was compiled before.

        Raises:
            ValueError: It cannot be compiled, is too complex, or allows no text.
        """
        with self._lock:
            if source not in self._kept:
                first = _on_deep_stack(lambda: self._matcher(source))
                self._kept[source] = Grammar(first, self._stop_ids, self._vocab)
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(source)
            return self._kept[source]

    def _matcher(self, source: Source) -> LLMatcher:
        try:
            first = self._compiled(source)
            said = reason(first.get_error()) if first.is_error() else None
        except BaseException as error:  # a panic of the library is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            said = reason(str(error))
        if said is not None:
            raise ValueError(
                f"[grammar] {_NAMES[source.kind]} must be one that can be followed but cannot: "
                f"{said}."
            )
        return first

    def _compiled(self, source: Source) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        kind, text = source
        if kind == "json_schema":
            written = LLMatcher.grammar_from_json_schema(text, defaults=JSON_STYLE)
        elif kind == "regex":
            written = LLMatcher.grammar_from_regex(text)
        else:
            written = LLMatcher.grammar_from_lark(text)
        limits = LLParserLimits(verbose_errors=False)
        first = LLMatcher(self._library, written, log_level=0, limits=limits)
        if not first.is_error():  # what allows no text is known with the first mask
            mask: NDArray[np.uint32] = np.zeros(-(-self._vocab // 32), np.uint32)
            first.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return first


_NAMES = {"json_schema": "a schema", "regex": "a regex", "lark": "a grammar"}
_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()
_making = threading.Lock()


def compile_grammar(pair: Pair, source: Source) -> Grammar:
    """A source compiled for a pair's vocabulary.

    Raises:
        ValueError: It cannot be compiled, llguidance is not installed, or the pair has no stop id.
    """
    return vocabulary_of(pair).compile(source)


def vocabulary_of(pair: Pair) -> Vocabulary:
    """Made once per pair; of 262144 tokens it takes some seconds.

    Raises:
        ValueError: llguidance is not installed, or the pair has no stop id.
    """
    check_installed()
    with _making:
        if pair.tokenizer not in _vocabularies:
            stop_ids = (*pair.tokenizer.answer_ends(), *pair.generation.stop_ids)
            if not stop_ids:
                raise ValueError(
                    "[grammar] the pair must have a stop id, which ends an answer, but has none."
                )
            vocab = pair.target.config.vocab_size
            ids = tuple(dict.fromkeys(stop_ids))
            _vocabularies[pair.tokenizer] = Vocabulary(pair.tokenizer, vocab, ids)
        return _vocabularies[pair.tokenizer]


class _Tokens:
    """The face that llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [
            tokenizer.spelling(i).encode() if i in tokenizer.special_ids
            else tokenizer.token_bytes(i)
            for i in range(vocab)
        ]  # fmt: skip

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


def _library_tokenizer(tokenizer: Tokenizer, vocab: int, stop_ids: tuple[int, ...]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(_Tokens(tokenizer, vocab, stop_ids[0]))
    return LLTokenizer(wrapped, n_vocab=vocab, eos_token=list(stop_ids))


def reason(said: str) -> str:
    """What the library has against a grammar, in one line."""
    said = said.split("\n<state>")[0]
    if said.startswith("NoExtension"):
        return "no text fits it"
    return " ".join(said.split()).rstrip(".")[:200] or "the library does not say why"


def _on_deep_stack(make: Callable[[], T]) -> T:
    """What ``make`` gives, called where the stack is deep."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(make())
        except BaseException as error:
            errors.append(error)

    with _making:
        usual = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run, name="pyengine-grammar")
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def bits(ids: Sequence[int], words: int) -> NDArray[np.uint32]:
    """A mask with the bits of these ids."""
    row = np.zeros(words, np.uint32)
    for i in ids:
        row[i // 32] |= np.uint32(1 << i % 32)
    return row
