"""Where drafts come from: one file per source, chosen by name."""

from __future__ import annotations

from typing import Literal

from pyengine.drafters.assistant import AssistantDrafter, AssistantLike
from pyengine.drafters.drafter import Drafter, TargetLike
from pyengine.drafters.lookup import LookupDrafter

Name = Literal["assistant", "lookup"]
NAMES: tuple[Name, ...] = ("assistant", "lookup")


def new_drafter(name: Name, target: TargetLike, assistant: AssistantLike | None) -> Drafter | None:
    """The drafter of that name, for one generation; None where it needs an assistant."""
    if name == "lookup":
        return LookupDrafter()
    return None if assistant is None else AssistantDrafter(target, assistant)
