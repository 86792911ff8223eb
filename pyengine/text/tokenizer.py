"""Text to token ids and back: tokenizer.json and tokenizer.model behind one face.

The library under it (``tokenizers`` or ``sentencepiece``) only splits ordinary text into pieces.
Special tokens, byte pieces and decoding are handled here, so both files of one vocabulary give the
same ids and the same text. Ids are always looked up by string, never assumed.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from pyengine.text.marks import Spellings, StandIns
from pyengine.text.template import ChatTemplate, Message, template_of
from pyengine.text.tokenizer_steps import check_steps
from pyengine.untrusted import SURROGATE, kind, optional, read_bytes, read_object, read_text

# Gemma 4's marks carry a bar inside an angle bracket: <|turn>, <turn|>, <|"|>. A tokenizer.model
# does not say which of its user-defined pieces are marks and which are text such as <table>.
_MARK = re.compile(r"<\|[^<>\s]*>|<[^<>\s]*\|>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_PROBE = "  a  b "
_NOWHERE = "\U0010fffd"
CHANNEL = ("<|channel>", "<channel|>")
CALL = ("<|tool_call>", "<tool_call|>", '<|"|>')
TOOL_RESULT = "<|tool_response>"
MAX_TOKENIZER = 64 << 20  # Gemma 4's tokenizer.json is about 33 MB


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
        check_steps(text, path)
        self._path, self._library = path, Library.from_str(text)
        self._library.no_truncation()
        self._library.no_padding()
        added = self._library.get_added_tokens_decoder()
        self.size = self._library.get_vocab_size(with_added_tokens=True)
        self.special = {
            token.content: i
            for i, token in added.items()
            if token.special or _MARK.fullmatch(token.content)
        }
        unknown = getattr(self._library.model, "unk_token", None)
        found = None if unknown is None else self.find(unknown)
        self.names = {} if found is None else {"unk_token": found}

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
    writes the raw text may open turns. :meth:`encode_chat` differs where it matters: what users
    and tools say stays ordinary text, so a quoted ``<turn|>`` cannot end the turn it is in.
    """

    def __init__(self, pieces: Pieces, config: dict[str, Any], template: str | None) -> None:
        self._pieces = pieces
        names = _named_tokens(config)
        self._special = {**pieces.special, **_look_up(pieces, names)}
        self._roles = {name: token for name, token in names.items() if token in self._special}
        for name, token in pieces.names.items():
            self._roles.setdefault(name, pieces.piece(token))
        self.special_ids = frozenset(self._special.values())
        unknown = self._special.get(self._roles.get("unk_token", "<unk>"))
        # What no vocabulary has may become <unk>; it is no mark
        self._marks = self.special_ids - {unknown}
        self._spellings = Spellings(self._special)
        self._bytes: dict[int, bytes] = {}
        if "<bos>" in self._special:
            self._roles.setdefault("bos_token", "<bos>")
        self.bos_id = self._special.get(self._roles.get("bos_token", ""))
        self._source = template
        self._stand_ins = StandIns(self._spellings)
        self._template: ChatTemplate | None = None  # with stand-ins for its marks
        self._whole = False
        if template is not None:
            # A template has the named tokens it speaks of as variables
            named = {
                name: self._stand_ins.of(text) if text in self._special else text
                for name, text in self._roles.items()
                if name in template
            }
            self._template = ChatTemplate(self._stand_ins.in_template(template), named)
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
        return self._source is not None

    @cached_property
    def longest_piece(self) -> int | None:
        """The most characters of a text that one token covers; None if there is no bound.

        That is so where single bytes are missing: the unknown token covers what no piece does.
        """
        if any(self._pieces.find(f"<0x{byte:02X}>") is None for byte in range(256)):
            return None
        pieces = map(self._pieces.piece, range(self._pieces.size))
        return max(map(len, chain(pieces, self._special)))

    @property
    def chat_template_error(self) -> str | None:
        """Why no chat can be rendered with the template, None where one can or there is none."""
        return None if self._template is None else self._template.error

    def channel_ids(self) -> tuple[int, ...]:
        """Ids of the marks around a thought; empty where the template knows no such channel."""
        marks = [self._special.get(mark) for mark in CHANNEL]
        if self._source is None or "channel" not in self._source or None in marks:
            return ()
        return tuple(mark for mark in marks if mark is not None)

    def call_ids(self) -> tuple[int, ...]:
        """Ids of the marks that open and close a tool call, and of the one around its strings.

        Empty where the vocabulary lacks one of them.
        """
        marks = [self._special.get(mark) for mark in CALL]
        return () if None in marks else tuple(mark for mark in marks if mark is not None)

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template can tell the model of tools."""
        return self._source is not None and "tools" in self._source

    def turn_ids(self) -> tuple[int, ...]:
        """Ids of the marks that begin and end a turn, as far as the vocabulary has them."""
        names = (("sot_token", "<|turn>"), ("eot_token", "<turn|>"))
        marks = [self._special.get(self._roles.get(name, usual)) for name, usual in names]
        return tuple(mark for mark in marks if mark is not None)

    def answer_ends(self) -> tuple[int, ...]:
        """Ids that end an answer in a conversation; none where there is no chat template.

        They are the end of a turn and, where the template writes it, the mark after which the
        result of a tool is due.
        """
        if self._source is None:
            return ()
        marks = [self._roles.get("eot_token", "<turn|>")]
        marks += [TOOL_RESULT] if TOOL_RESULT in self._source else []
        return tuple(self._special[mark] for mark in marks if mark in self._special)

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
        _check_unicode([text])
        ids: list[int] = []
        for i, part in enumerate(self._spellings.split(text)):
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
        _check_unicode(strings([*messages, kwargs]))
        stand_ins = self._stand_ins.copy()
        everything = [_map_strings(message, stand_ins.in_text) for message in messages]
        return stand_ins.restored(self._render(stand_ins, everything, kwargs))

    def encode_chat(self, messages: Sequence[Message], **kwargs: Any) -> list[int]:
        """Token ids of a rendered conversation; text of users and tools cannot forge marks.

        Special tokens are what the template itself writes, and what the content of system and
        developer messages spells (``<|think|>`` is switched on there). The content of assistant
        messages may hold the marks around a thought, by which templates leave thoughts out; what
        else the model is told to have said, a user may have made it say. Everywhere else, in what
        users, tools, calls, results and declarations say, each spelling is ordinary text.
        Arguments and errors: :meth:`apply_chat_template`.
        """
        _check_unicode(strings([*messages, kwargs]))
        stand_ins = self._stand_ins.copy()
        ready = [_with_stand_ins(message, stand_ins) for message in messages]
        rendered = self._render(stand_ins, ready, kwargs)
        self._check_whole()
        return self._encode_rendered(stand_ins, rendered)

    def takes_parts(self, role: str, first: bool) -> bool:
        """Whether the template prints text parts in such a message; else it wants one string."""
        user = [{"role": "user", "content": "a"}]
        texts = []
        for content in ("words", [{"type": "text", "text": "words"}]):
            message = {"role": role, "content": content}
            try:
                rendered = self._render(
                    self._stand_ins, [message, *user] if first else [*user, message, *user], {}
                )
            except ValueError:
                return False
            texts.append("".join(rendered.split()))
        return texts[0] == texts[1]

    def _render(
        self, stand_ins: StandIns, messages: Sequence[Message], variables: dict[str, Any]
    ) -> str:
        if self._template is None:
            raise ValueError(
                "[tokenizer] the checkpoint must have a chat template for messages but has none."
            )
        try:
            return self._template.render(messages, **variables)
        except ValueError as error:
            raise ValueError(stand_ins.restored(str(error))) from error

    def _encode_rendered(self, stand_ins: StandIns, rendered: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(stand_ins.split(rendered)):
            ids += [self._special[part]] if i % 2 else self._ordinary(part)
        return ids

    def _ordinary(self, text: str) -> list[int]:
        """Ids of text in which special tokens have no effect."""
        ids = [i for part in self._spellings.broken(text) if part for i in self._pieces.split(part)]
        if self._marks.isdisjoint(ids):
            return ids
        # A library may find one behind its normaliser, or have a single character as one
        spelled = [self._as_bytes(token) if token in self._marks else [token] for token in ids]
        return [token for part in spelled for token in part]

    def _as_bytes(self, token: int) -> list[int]:
        text = self._pieces.piece(token).replace(_SPACE, " ")
        found = [self._pieces.find(f"<0x{byte:02X}>") for byte in text.encode()]
        ids = [i for i in found if i is not None and i not in self._marks]
        if len(ids) < len(found):
            raise ValueError(
                f"[tokenizer] messages must not hold {text!r}: this vocabulary has it as a special "
                "token only."
            )
        return ids

    def _check_whole(self) -> None:
        """Refuse a template that puts a special token together: it would count as plain text."""
        if self._whole:
            return
        try:
            rendered = self._render(self._stand_ins, [{"role": "user", "content": "a"}], {})
        except ValueError:  # it wants other messages
            rendered = ""
        if built := self._stand_ins.built(rendered):
            raise ValueError(
                "[tokenizer] chat template must spell each special token in one piece but builds "
                f"{built}."
            )
        self._whole = True


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
        if path := optional(directory, name, "tokenizer"):
            template = template_of(directory, config)
            with _library_errors(path):
                return Tokenizer(read(path), config, template)
    raise ValueError(
        f"[tokenizer] {directory} must hold tokenizer.json or tokenizer.model but has neither."
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = optional(directory, "tokenizer_config.json", "tokenizer")
    return read_object(path, "tokenizer") if path else {}


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


def _with_stand_ins(message: Message, stand_ins: StandIns) -> Message:
    """The message with stand-ins for the special tokens that its role may spell."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "assistant", "model") or content is None:
        return message
    only = CHANNEL if role in ("assistant", "model") else None
    return {**message, "content": _map_strings(content, lambda s: stand_ins.in_text(s, only))}


def strings(value: Any) -> Iterator[str]:
    """Every string inside nested messages."""
    inside = [value]
    while inside:
        item = inside.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            inside += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            inside += item


def _check_unicode(texts: Iterable[str]) -> None:
    if any(map(SURROGATE.search, texts)):
        raise ValueError("[tokenizer] text must be Unicode but holds a lone surrogate.")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_map_strings(inner, change) for inner in value]
    return value
