"""A conversation: turns kept within the context, the cache kept between turns."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from types import NoneType
from typing import TYPE_CHECKING, Any

from pyengine.engine.prefix import Prefix
from pyengine.generation import Stream, stream
from pyengine.sampling.settings import Sampling
from pyengine.task import (
    BlockSize,
    Result,
    Step,
    check_settings,
    check_variables,
    prompt_ids,
    resolve_sampling,
)
from pyengine.text.output import stop_strings
from pyengine.text.template import Message
from pyengine.untrusted import SURROGATE, shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair


class Chat:
    """Turns of one conversation with a pair; the settings are those of ``generate``.

    When the context is nearly full, the oldest turns are forgotten, but never the system message;
    ``forgotten`` counts them.

    Raises:
        ValueError: The pair has no chat template, or a setting is impossible.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        block_size: BlockSize = "auto",
        drafter: str | None = None,
        stop: str | Sequence[str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        check_settings(pair, max_tokens, block_size, drafter)
        if not pair.tokenizer.has_chat_template:
            raise ValueError("[chat] the checkpoint must have a chat template but has none.")
        resolve_sampling(pair, sampling)
        check_variables(variables)
        if not isinstance(system, (str, NoneType)):
            raise ValueError(f"[chat] system must be text or None but got {shown(system)}.")
        self.pair = pair
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.block_size = block_size
        self.drafter = drafter
        self.stop = stop_strings(stop)
        self.variables = variables
        self.prefix = Prefix()
        self.system: list[Message] = []
        if system is not None:
            self.system.append({"role": "system", "content": system})
        self.turns: list[Message] = []
        self.forgotten = 0
        self._running: Stream | None = None

    def ask(self, text: str) -> Iterator[str]:
        """Send a turn and yield the answer's text as it comes; otherwise like :meth:`steps`."""
        with closing(self.steps(text)) as steps:
            yield from (step.text for step in steps if step.text)

    def steps(self, text: str) -> Generator[Step, None, None]:
        """Send a turn and yield what each round adds to the answer.

        The turn joins the conversation when the answer has ended, or was abandoned with some text.

        Raises:
            ValueError: The text alone does not fit the context, or a setting is impossible.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        turns = self._fitting(turns)
        self._running = stream(
            [*self.system, *turns],
            pair=self.pair,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            block_size=self.block_size,
            drafter=self.drafter,
            stop=self.stop,
            variables=self.variables,
            prefix=self.prefix,
        )
        with self._running as running:
            try:
                yield from running.steps()
            finally:
                if running.result.tokens:
                    answer: Message = {"role": "assistant", "content": running.result.text}
                    self.turns = [*turns, answer]

    @property
    def result(self) -> Result:
        """The result of the newest answer.

        Raises:
            ValueError: No question has been asked yet.
        """
        if self._running is None:
            raise ValueError("[chat] a question must be asked before there is a result.")
        return self._running.result

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, its system message first."""
        return [*self.system, *self.turns]

    def resume(self, messages: Any) -> None:
        """Replace this conversation by an earlier one, its system message included.

        Args:
            messages: What :attr:`messages` returned.

        Raises:
            ValueError: They are something else; nothing changes.
        """
        if not isinstance(messages, list):
            raise ValueError(f"[chat] messages must be a list but got {shown(messages)}.")
        for number, message in enumerate(messages, 1):
            where = f"[chat] message {number} must"
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise ValueError(f"{where} have a role and content alone but got {shown(message)}.")
            content = message["content"]
            if not isinstance(content, str) or SURROGATE.search(content):
                raise ValueError(f"{where} have text as its content but got {shown(content)}.")
        system = messages[:1] if messages and messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        roles = [message["role"] for message in turns]
        if roles != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(
                "[chat] messages must be of user and assistant in turn, after a system message at "
                f"most, but the roles are {shown(roles)}."
            )
        self.system, self.turns = list(system), list(turns)

    def clear(self) -> None:
        """Begin anew; the system message stays."""
        self.turns = []

    def _fitting(self, turns: list[Message]) -> list[Message]:
        """The newest turns that leave room for an answer."""
        context = self.pair.target.context
        wanted = context if self.max_tokens is None else self.max_tokens
        room = context - min(wanted, context // 4)
        while len(turns) > 1:
            try:
                ids = prompt_ids(self.pair, [*self.system, *turns], variables=self.variables)
            except ValueError:
                if len(turns) <= 2:
                    raise
            else:
                if len(ids) <= room:
                    break
            turns = turns[2:]  # a question and its answer
            self.forgotten += 2
        return turns
