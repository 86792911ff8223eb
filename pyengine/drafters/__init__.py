"""Where drafts come from: one file per source, chosen by name."""

from __future__ import annotations

import re
from typing import Any

from pyengine.drafters.assistant import AssistantDrafter, AssistantLike
from pyengine.drafters.dflash import DFlashDrafter, DFlashLike
from pyengine.drafters.drafter import Drafter
from pyengine.drafters.early import early_drafter
from pyengine.drafters.lookup import LookupDrafter
from pyengine.drafters.mixed import MixedDrafter

NAMES = ("assistant", "dflash", "lookup", "early:N", "NAME+lookup")
WITH_LOOKUP = "+lookup"


def is_name(name: Any) -> bool:
    """Whether it is one of NAMES, with a number of layers for N and another of them for NAME."""
    if not isinstance(name, str):
        return False
    first = first_of(name)
    if first != name:
        return first != "lookup" and first_of(first) == first and is_name(first)
    return name in NAMES[:3] or exit_depth(name) is not None


def first_of(name: str) -> str:
    """Of a mix the drafter that drafts where the text is new; else the name itself."""
    return name.removesuffix(WITH_LOOKUP)


def exit_depth(name: str) -> int | None:
    """N of "early:N"; None for other names."""
    found = re.fullmatch(r"early:([1-9][0-9]{0,3})", name, re.ASCII)
    return None if found is None else int(found[1])


def new_drafter(
    name: str, target: Any, assistant: AssistantLike | None, dflash: DFlashLike | None = None
) -> Drafter | None:
    """The drafter of that name, for one generation; None where the model that it needs is none."""
    if (first := first_of(name)) != name:
        other = new_drafter(first, target, assistant, dflash)
        return None if other is None else MixedDrafter(other, first)
    if name == "dflash":
        return None if dflash is None else DFlashDrafter(dflash)
    if name == "lookup":
        return LookupDrafter()
    if (depth := exit_depth(name)) is not None:
        return early_drafter(depth)(target)
    return None if assistant is None else AssistantDrafter(target, assistant)
