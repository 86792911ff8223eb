"""Lookup and another drafter by turns: no text depends on it but by the rules' own draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import decode as plain_decode
from test_lookup import circle, every_three_tokens
from test_loop import GREEDY, LENGTH, NUCLEUS, SMALL, MarkovTarget, Reads, cells, p_value
from tiny_pairs import FLAVOURS, greedy_text, tiny_pair

import pyengine
from pyengine.drafters import first_of, is_name, new_drafter
from pyengine.drafters.assistant import AssistantDrafter
from pyengine.drafters.lookup import LookupDrafter
from pyengine.drafters.mixed import LONG_MATCH, MixedDrafter, kind_of, looks_up, source_of
from pyengine.engine.loop import decode
from pyengine.engine.stats import Stats
from pyengine.ops.accept_block import RULES, Rule
from pyengine.sampling.settings import Sampling

AGAIN = [7, 30, 41, 52, 63, 74, 85, 96, 107, 118]
