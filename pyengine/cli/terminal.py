"""The line editor of ``pyengine chat``. It shows itself on standard error."""

from __future__ import annotations

import os
import sys

from prompt_toolkit import PromptSession
from prompt_toolkit.data_structures import Size
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output


class Editor:
    """Reads turns of one or several lines; earlier ones come back until the process ends."""

    def __init__(self) -> None:
        # No question about the cursor: the terminal's reply could end up in the next answer
        output = Vt100_Output(sys.stderr, _size, term=os.environ.get("TERM"), enable_cpr=False)
        self._session: PromptSession[str] = PromptSession(
            output=output, multiline=True, key_bindings=_keys(), prompt_continuation="  "
        )

    def read(self, prompt: str) -> str | None:
        """The next turn behind a prompt, None at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C at an empty line.
        """
        while True:
            try:
                return self._session.prompt(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise


def _size() -> Size:
    columns, rows = os.get_terminal_size(sys.stderr.fileno())
    return Size(rows=rows or 24, columns=columns or 80)  # some terminals say 0


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def end(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
