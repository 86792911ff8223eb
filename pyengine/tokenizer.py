"""Text to token ids and back: tokenizer.json and tokenizer.model behind one face.

The library under it (``tokenizers`` or ``sentencepiece``) only splits ordinary text into pieces.
Special tokens, byte pieces and decoding are handled here, so both files of one vocabulary give the
same ids and the same text. Ids are always looked up by string, never assumed.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from pyengine.chat_template import ChatTemplate, Message, template_of
from pyengine.files import SURROGATE, kind, read_bytes, read_object, read_text, within

# Gemma 4's marks carry a bar inside an angle bracket: <|turn>, <turn|>, <|"|>. A tokenizer.model
# does not say which of its user-defined pieces are marks and which are text such as <table>.
_MARK = re.compile(r"<\|[^<>\s]*>|<[^<>\s]*\|>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_PROBE = "  a  b "
_NOWHERE = "\U0010fffd"
MAX_TOKENIZER = 256 << 20  # Gemma 4's tokenizer.json is about 33 MB


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """A library's failure on a file as one sentence; a panic of Rust's is no Exception."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if str(error).startswith("[tokenizer] ") or not (panic or isinstance(error, Exception)):
            raise
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise ValueError(f"[tokenizer] {path} cannot be read: {reason}.") from error


class Pieces(Protocol):
    """What a tokenizer library is asked for."""

    size: int
    special: dict[str, int]  # marks the file itself declares
    names: dict[str, int]  # bos_token, eos_token, ... where the file numbers them

    def split(self, text: str) -> list[int]: ...

    def piece(self, token: int) -> str: ...

    def find(self, piece: str) -> int | None: ...


class JsonPieces:
    """A tokenizer.json, read by ``tokenizers``."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        text = read_text(path, "tokenizer", MAX_TOKENIZER)
        self._path, self._library = path, Library.from_str(text)
        steps = (self._library.normalizer, self._library.pre_tokenizer)
        patterns = [step.__getstate__() for step in steps if step is not None]
        # Gemma's cut at single characters; an expression of a stranger's could take for ever.
        if any(b'"Regex"' in pattern for pattern in patterns):
            raise ValueError(
                f"[tokenizer] {path} must cut text without regular expressions but has one; "
                "is this a Gemma 4 tokenizer?"
            )
        self._library.no_truncation()
        self._library.no_padding()
        added = self._library.get_added_tokens_decoder()
        self.size = self._library.get_vocab_size(with_added_tokens=True)
        self.special = {
            token.content: i
            for i, token in added.items()
            if token.special or _MARK.fullmatch(token.content)
        }
        self.names: dict[str, int] = {}

    def split(self, text: str) -> list[int]:
        with _library_errors(self._path):
            return list(self._library.encode(text, add_special_tokens=False).ids)

    def piece(self, token: int) -> str:
        return self._library.id_to_token(token) or ""

    def find(self, piece: str) -> int | None:
        return self._library.token_to_id(piece)


class SentencePieces:
    """A tokenizer.model, read by ``sentencepiece``."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        data = read_bytes(path, "tokenizer", MAX_TOKENIZER)
        self._path, self._library = path, SentencePieceProcessor(model_proto=data)
        self.size = self._library.vocab_size()
        pieces = self._library.id_to_piece(list(range(self.size)))
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self.special = {
            piece: i
            for i, piece in enumerate(pieces)
            if self._library.is_control(i) or self._library.is_unknown(i) or _MARK.fullmatch(piece)
        }
        numbered = {
            "bos_token": self._library.bos_id(),
            "eos_token": self._library.eos_id(),
            "pad_token": self._library.pad_id(),
            "unk_token": self._library.unk_id(),
        }
        self.names = {name: i for name, i in numbered.items() if i >= 0}

    def split(self, text: str) -> list[int]:
        with _library_errors(self._path):
            return list(self._library.encode(text, out_type=int))

    def piece(self, token: int) -> str:
        return str(self._library.id_to_piece(token))

    def find(self, piece: str) -> int | None:
        return self._ids.get(piece)


class Tokenizer:
    """Encodes, decodes and renders the chat template of one checkpoint.

    Special tokens written in ``encode``'s text become their ids, as in every Gemma tool: whoever
    writes the raw text may open turns. :meth:`encode_chat` differs where it matters: in the
    messages of the roles ``user`` and ``tool`` such strings stay ordinary text, so a quoted
    ``<turn|>`` cannot end the turn it is in.
    """

    def __init__(self, pieces: Pieces, config: dict[str, Any], template: str | None) -> None:
        self._pieces = pieces
        names = _named_tokens(config)
        self._special = {**pieces.special, **_look_up(pieces, names)}
        self._roles = {name: token for name, token in names.items() if token in self._special}
        for name, token in pieces.names.items():
            self._roles.setdefault(name, pieces.piece(token))
        self.special_ids = frozenset(self._special.values())
        ordered = sorted(self._special, key=len, reverse=True)
        either = "|".join(map(re.escape, ordered)) or "(?!)"
        self._split_special = re.compile(f"({either})")
        self._bytes: dict[int, bytes] = {}
        bos = self._roles.get("bos_token", "<bos>")
        self.bos_id = self._special.get(bos)
        self._template = ChatTemplate(template, self._roles) if template is not None else None
        kept = self.decode(self.encode(_PROBE))
        if kept != _PROBE:
            raise ValueError(
                f"[tokenizer] spaces must survive encode and decode but {_PROBE!r} became "
                f"{kept!r}; is this a Gemma 4 tokenizer?"
            )
        self.encode(_NOWHERE)  # what no vocabulary has must go somewhere too

    @property
    def vocab_size(self) -> int:
        return self._pieces.size

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template_error(self) -> str | None:
        """Why no chat can be rendered with the template, None where one can or there is none."""
        return None if self._template is None else self._template.error

    def channel_ids(self) -> tuple[int, ...]:
        """Ids of the marks around a thought; empty where the template knows no such channel."""
        marks = [self._special.get(mark) for mark in ("<|channel>", "<channel|>")]
        if self._template is None or "channel" not in self._template.source or None in marks:
            return ()
        return tuple(mark for mark in marks if mark is not None)

    def id_of(self, piece: str) -> int | None:
        """Id of a special token or a piece, None when the vocabulary lacks it."""
        found = self._special.get(piece)
        return self._pieces.find(piece) if found is None else found

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens written in it become their ids.

        Args:
            text: Any text.
            bos: Puts the beginning-of-sequence id first, unless the text starts with it already.

        Raises:
            ValueError: The text is no Unicode text.
        """
        if SURROGATE.search(text):
            raise ValueError("[tokenizer] text must be Unicode but holds a lone surrogate.")
        ids: list[int] = []
        for i, part in enumerate(self._split_special.split(text)):
            if i % 2:
                ids.append(self._special[part])
            elif part:
                ids += self._pieces.split(part)
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are skipped, bytes that form no character give U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token; empty for special tokens and ids without a piece."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def spelling(self, token: int) -> str:
        """How a token is told to people: its text, its name if it is special, else its bytes."""
        data = self.token_bytes(token)
        try:
            return data.decode("utf-8") or self._pieces.piece(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _spell(self, token: int) -> bytes:
        if token in self.special_ids or not 0 <= token < self._pieces.size:
            return b""
        piece = self._pieces.piece(token)
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ").encode()

    def detokenizer(self) -> StreamingDetokenizer:
        """A decoder for one stream of tokens."""
        return StreamingDetokenizer(self)

    def apply_chat_template(self, messages: Sequence[Message], **kwargs: Any) -> str:
        """Render a conversation as the prompt the model was trained on, ``<bos>`` included.

        Args:
            messages: Dicts with ``role`` and ``content``, as the template wants them.
            **kwargs: Further template variables, such as ``tools`` and ``enable_thinking``;
                ``add_generation_prompt`` is true unless given.

        Raises:
            ValueError: There is no template, or it refuses the messages.
        """
        if self._template is None:
            raise ValueError(
                "[tokenizer] the checkpoint must have a chat template for messages but has none."
            )
        return self._template.render(messages, **kwargs)

    def encode_chat(self, messages: Sequence[Message], **kwargs: Any) -> list[int]:
        """Token ids of a rendered conversation; text of users and tools cannot forge marks.

        Everything the template writes, and system and assistant messages (``<|think|>`` is
        switched on there), may hold special tokens. In other messages their spelling is
        encoded as ordinary text. Arguments and errors: :meth:`apply_chat_template`.
        """
        spelled = "".join(chain.from_iterable(map(_strings, messages)))
        gap = next((c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in spelled), None)
        if gap is None:
            raise ValueError(
                "[tokenizer] messages must leave one of U+FDD0 to U+FDEF unused but hold them all."
            )
        trusted = ("system", "developer", "assistant", "model")
        guarded = [
            m if m.get("role") in trusted else _map_strings(m, lambda s: self._guard(s, gap))
            for m in messages
        ]
        rendered = self.apply_chat_template(guarded, **kwargs)
        return [token for part in rendered.split(gap) for token in self.encode(part)]

    def _guard(self, text: str, gap: str) -> str:
        """Put ``gap`` inside every special token's spelling, also one a later part could finish."""
        text = self._split_special.sub(lambda m: m[0][0] + gap + m[0][1:], text)
        unfinished = any(text.endswith(s[:n]) for s in self._special for n in range(1, len(s)))
        return text + gap if unfinished else text


class StreamingDetokenizer:
    """Turns tokens into text one at a time and never emits part of a character.

    All pieces and the one of :meth:`finish` together equal ``Tokenizer.decode`` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Text that is certain after one more token; often whole, sometimes empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: U+FFFD when the tokens end within a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder; tokenizer.json is preferred to tokenizer.model.

    The chat template is chat_template.jinja, else the one in tokenizer_config.json, else none.

    Raises:
        ValueError: A file is missing or damaged, or is not a tokenizer of this family.
    """
    directory = Path(directory)
    config = _read_config(directory)
    kinds: list[tuple[str, Callable[[Path], Pieces]]] = [
        ("tokenizer.json", JsonPieces),
        ("tokenizer.model", SentencePieces),
    ]
    for name, read in kinds:
        if (path := within(directory, name, "tokenizer")).is_file():
            template = template_of(directory, config)
            with _library_errors(path):
                return Tokenizer(read(path), config, template)
    raise ValueError(
        f"[tokenizer] {directory} must hold tokenizer.json or tokenizer.model but has neither."
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = within(directory, "tokenizer_config.json", "tokenizer")
    return read_object(path, "tokenizer") if path.is_file() else {}


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens a tokenizer_config names: ``{"bos_token": "<bos>", ...}``.

    ``extra_special_tokens`` is a map in some files and a list in others.
    """
    extra = _part(config, "extra_special_tokens", dict, list)
    listed = list(_part(config, "additional_special_tokens", list))
    listed += extra if isinstance(extra, list) else []
    declared = _part(config, "added_tokens_decoder", dict).values()
    listed += [token for token in declared if isinstance(token, dict) and token.get("special")]
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    named |= {f"special_{i}": token for i, token in enumerate(listed)}
    texts = {k: t.get("content") if isinstance(t, dict) else t for k, t in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def _part(config: dict[str, Any], key: str, *kinds: type) -> Any:
    """A value of tokenizer_config.json that must be of these types; absent is empty."""
    value = config.get(key) or kinds[0]()
    if not isinstance(value, kinds):
        words = " or ".join(kind(k()) for k in kinds)
        raise ValueError(f"[tokenizer] `{key}` must be {words} but got {kind(value)}.")
    return value


def _look_up(pieces: Pieces, names: dict[str, str]) -> dict[str, int]:
    """Ids of the named tokens; a name the vocabulary spells otherwise goes by its number."""
    found: dict[str, int] = {}
    for name, text in names.items():
        token = pieces.find(text)
        token = pieces.names.get(name) if token is None else token
        if token is not None:
            found[text] = token
    return found


def _strings(value: Any) -> list[str]:
    """Every string inside nested messages."""
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return [s for v in inner for s in _strings(v)] if isinstance(value, (dict, list)) else []


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        # A template may print names too
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_map_strings(inner, change) for inner in value]
    return value
