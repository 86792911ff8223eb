"""A conversation: turns kept within the context, the cache kept between turns."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from types import NoneType
from typing import TYPE_CHECKING, Any

from pyengine.arguments import TooLong
from pyengine.engine.prefix import Prefix
from pyengine.generation import Stream, stream
from pyengine.sampling.settings import Sampling
from pyengine.task import (
    BlockSize,
    EarlyExit,
    Result,
    Step,
    check_settings,
    check_tree,
    check_tree_round,
    check_variables,
    early_exit_of,
    prompt_ids,
    resolve_sampling,
)
from pyengine.text.output import stop_strings
from pyengine.text.prompt import check_shows_tools
from pyengine.text.template import Message
from pyengine.text.tokenizer import strings
from pyengine.text.tool_calls import ToolCall
from pyengine.text.tools import Tool, tool_use
from pyengine.untrusted import SURROGATE, shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair


NO_RESULT = "There is no result: the call was not made."
# What a saved message holds; calls and the thought before them are beside an answer that calls
KEYS = {"role", "content"}
FOLLOW = {"user": ["assistant"], "assistant": ["user"], "tool": ["assistant", "user"]}
ALSO = {"assistant": {"tool_calls", "reasoning_content"}, "tool": {"tool_call_id"}}


class Chat:
    """Turns of one conversation with a pair; the settings are those of ``generate``.

    When the context is nearly full, the oldest turns are forgotten, but never the system message;
    ``forgotten`` counts them.

    Where ``tools`` are given an answer may end with calls. :attr:`open_calls` are those that wait;
    :meth:`give` takes what they returned, and the model goes on. Those that wait when the next turn
    is sent count as not made.

    With ``early_exit`` every answer is approximate, as its result says, and each turn processes the
    whole conversation again. What is promised is of prompts like the calibrated ones: of later
    turns, and of a first one behind other messages, only if those were such conversations.

    With ``tree`` each round's drafts are a tree of so many; no answer depends on it.

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
        tools: Sequence[Tool] | None = None,
        early_exit: EarlyExit = None,
        tree: int | None = None,
    ) -> None:
        check_tree(tree, block_size, drafter)
        self.early_exit = early_exit_of(early_exit, block_size, drafter)
        check_settings(pair, max_tokens, block_size, drafter)
        if not pair.tokenizer.has_chat_template:
            raise ValueError("[chat] the checkpoint must have a chat template but has none.")
        settings = resolve_sampling(pair, sampling)
        check_variables(variables)
        use = tool_use(tools, "auto", True)
        self.tools = use.shown
        if self.tools:
            check_shows_tools(pair.tokenizer)
        if tree is not None:
            check_tree_round(pair, settings, bool(use.strict))
        if not isinstance(system, (str, NoneType)):
            raise ValueError(f"[chat] system must be text or None but got {shown(system)}.")
        self.pair = pair
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.block_size = block_size
        self.drafter = drafter
        self.tree = tree
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
        results = [_result(call, NO_RESULT) for call in self.open_calls]
        return self._go_on([*self.turns, *results, {"role": "user", "content": text}])

    @property
    def open_calls(self) -> list[ToolCall]:
        """The calls of the newest answer, while nobody gave their results."""
        calls = self.turns[-1].get("tool_calls", []) if self.turns else []
        return [ToolCall(call["id"], **call["function"]) for call in calls]

    def give(self, results: Sequence[str | dict[str, Any]]) -> Generator[Step, None, None]:
        """Give what the open calls returned, in their order; otherwise like :meth:`steps`.

        Args:
            results: Text, or an object as JSON has them.

        Raises:
            ValueError: There are more or fewer results than calls.
        """
        calls = self.open_calls
        if not calls or len(results) != len(calls):
            raise ValueError(
                f"[chat] results must be one for each open call, {len(calls)}, but got "
                f"{len(results)}."
            )
        given = [_result(call, result) for call, result in zip(calls, results, strict=True)]
        return self._go_on([*self.turns, *given])

    def _go_on(self, turns: list[Message]) -> Generator[Step, None, None]:
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
            tools=self.tools,
            early_exit=self.early_exit,
            tree=self.tree,
            prefix=None if self.early_exit else self.prefix,
        )
        with self._running as running:
            try:
                yield from running.steps()
            finally:
                if running.result.tokens:
                    self.turns = [*turns, _message(running.result)]

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
            _check_saved(message, f"[chat] message {number} must")
        system = messages[:1] if messages and messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        if not _in_turn(turns):
            raise ValueError(
                "[chat] messages must be of user and assistant in turn, each call with its result "
                "between, after a system message at most, but the roles are "
                f"{shown([message['role'] for message in turns])}."
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
        while begin := _second_question(turns):
            try:
                ids = prompt_ids(
                    self.pair,
                    [*self.system, *turns],
                    variables=self.variables,
                    tools=self.tools,
                )
                if len(ids) <= room:
                    break
            except TooLong:
                pass
            turns = turns[begin:]
            self.forgotten += begin
        return turns


def _second_question(turns: list[Message]) -> int:
    """Where the first question and all that belongs to it ends; 0 if there is no other."""
    return next((i for i, turn in enumerate(turns) if i and turn["role"] == "user"), 0)


def _message(result: Result) -> Message:
    """An answer as a message. The thought before a call is what templates give back of thoughts."""
    answer: Message = {"role": "assistant", "content": result.text}
    if result.tool_calls:
        answer["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in result.tool_calls
        ]
        if result.thinking:
            answer["reasoning_content"] = result.thinking
    return answer


def _result(call: ToolCall, content: str | dict[str, Any]) -> Message:
    return {"role": "tool", "tool_call_id": call.id, "content": content}


def _check_saved(message: Any, where: str) -> None:
    """Refuse what is none of :attr:`Chat.messages`.

    Raises:
        ValueError: It holds something else.
    """
    role = message.get("role") if isinstance(message, dict) else None
    also = ALSO.get(role, set()) if isinstance(role, str) else set()
    if not isinstance(message, dict) or not KEYS <= set(message) <= KEYS | also:
        raise ValueError(f"{where} have a role and content alone but got {shown(message)}.")
    content = message["content"]
    if not isinstance(content, str) and not (isinstance(content, dict) and role == "tool"):
        raise ValueError(f"{where} have text as its content but got {shown(content)}.")
    if any(map(SURROGATE.search, strings(message))):
        raise ValueError(f"{where} have text as its content but got {shown(message)}.")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise ValueError(
            f"{where} have calls with an id, name and arguments but got {shown(calls)}."
        )


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    texts = [call.get("id"), *function.values()] if isinstance(function, dict) else []
    named = isinstance(function, dict) and set(function) == {"name", "arguments"}
    return named and all(isinstance(text, str) for text in texts)


def _in_turn(turns: list[Message]) -> bool:
    """Whether each question is answered, and each call but the newest ones has its result."""
    due: list[str] = []
    before = "assistant"
    for turn in turns:
        role = turn["role"]
        if role not in (["tool"] if due else FOLLOW[before]):
            return False
        if due and turn.get("tool_call_id") != due.pop(0):
            return False
        due += [call["id"] for call in turn.get("tool_calls", [])]
        before = role
    return before == "assistant"
