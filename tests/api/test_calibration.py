"""Calibration: whole answers against the full model's, by hand; and the control that must fail."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from pyengine import Sampling, calibrate, generate
from pyengine.calibration import THRESHOLDS, check_settings
from pyengine.checkpoint.certificate import read_certificate
from pyengine.engine.early_exit import EarlyRounds, Exit
from pyengine.engine.loop import decode
from pyengine.risk import loss, p_value
from pyengine.task import embedded_pair, prompt_ids

GAMES = ("Snake", "Pong", "Breakout", "Space Shooter", "Flappy Bird", "Road Crossing")
ASKED = ("Write a {} game.", "Create a {} game with canvas.", "Please build {} in one HTML file.")
PROMPTS = [asked.format(game) for asked in ASKED for game in GAMES]


def answer(prompt: str, exit: Exit, sampling: Sampling) -> list[int]:
    """With exits, by the loop alone."""
    pair = embedded_pair()
    ids, ends = prompt_ids(pair, prompt), frozenset(pair.generation.stop_ids)
    ask: dict[str, Any] = {"sampling": sampling, "block_size": 1, "max_tokens": exit.length}
    rounds = decode(pair.target, None, ids, **ask, stop_ids=ends, rounds=EarlyRounds(exit))
    return [token for done in rounds for token in done.tokens]


@pytest.mark.parametrize("metric", ["lcs", "differs"])
def test_losses_are_those_of_the_answers(metric: Any) -> None:
    """Sampled, with a seed for each prompt; every threshold that is tested, and no other."""
    told: list[tuple[int, int, str]] = []
    sampling, prompts = Sampling(seed=5), PROMPTS[:6]
    thresholds = [0.9, 0.5, 0.0]
    found = calibrate(
        prompts,
        layer=6,
        delta=0.45,
        epsilon=0.5,
        metric=metric,
        thresholds=thresholds,
        max_tokens=12,
        sampling=sampling,
        on_answer=lambda *at: told.append(at),
    )
    want, ended = [], False
    for threshold in thresholds:
        total = 0.0
        for i, prompt in enumerate(prompts):
            own = replace(sampling, seed=5 + i)
            full = generate(prompt, block_size=1, max_tokens=12, sampling=own).tokens
            total += loss(metric, answer(prompt, Exit(6, threshold, 4.0, 12), own), full)
        if not ended:
            p = p_value(total, 6, 0.45, metric == "differs")
            want.append((threshold, pytest.approx(total), pytest.approx(p)))
            ended = p > 0.5
    assert [(one.threshold, one.total, one.p_value) for one in found.tested] == want
    layers = [one.mean_layers for one in found.tested]
    assert all(6 <= n <= 24 for n in layers if n is not None)
    assert all(a >= b for a, b in pairwise([n for n in layers if n is not None]))
    done = [at[0] for at in told]
    assert done == sorted(done) and told[-1] == (24, 24, "done") and told[0][2].startswith("full ")


def test_what_passes_is_used(tmp_path: Any) -> None:
    found = calibrate(
        PROMPTS[:6],
        layer=6,
        delta=0.5,
        thresholds=[1.0, 0.9],
        max_tokens=16,
        sampling=Sampling(temperature=0.0),
    )
    assert found.threshold in (1.0, 0.9) and found.n == 6 and found.sampling.seed is None
    assert found.tested[0].mean_layers is not None and found.tested[0].mean_layers < 24
    found.write(tmp_path / "exit.json")
    assert read_certificate(tmp_path / "exit.json") == found
    ask: dict[str, Any] = {"sampling": {"temperature": 0.0}}
    result = generate(PROMPTS[0], early_exit=tmp_path / "exit.json", **ask)
    exit = Exit(6, found.threshold or 0.0, 4.0, 16)
    assert result.tokens == answer(PROMPTS[0], exit, Sampling(temperature=0.0))
    other = calibrate(PROMPTS[1:7], layer=6, max_tokens=2, thresholds=[1.0])
    assert other.prompts != found.prompts and other.target == found.target


@pytest.mark.parametrize("layer", [3, 4])
def test_an_exit_that_knows_nothing_is_not_certified(layer: int) -> None:
    """The control: layers whose lens agrees with the model in less than a tenth of tokens."""
    found = calibrate(
        PROMPTS,
        layer=layer,
        delta=0.2,
        thresholds=[0.1, 0.05, 0.0],
        max_tokens=16,
        sampling=Sampling(temperature=0.0),
    )
    assert found.threshold is None
    [one] = found.tested  # nothing behind the first is tested
    assert one.total > 0.2 * len(PROMPTS) and one.p_value > 0.9
    # Layer 6, on the same prompts, passes
    good = calibrate(
        PROMPTS,
        layer=6,
        delta=0.2,
        thresholds=[0.9],
        max_tokens=16,
        sampling=Sampling(temperature=0.0),
    )
    assert good.threshold == 0.9


def test_too_few_prompts_pass_nothing() -> None:
    found = calibrate(PROMPTS[:3], layer=6, max_tokens=4, sampling=Sampling(temperature=0.0))
    assert found.threshold is None and found.tested[0].total == 0
    assert found.tested[0].p_value == pytest.approx(0.9**3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 0}, "layer must be at least 1 but got 0."),
        ({"layer": 1.5}, "layer must be a whole number but got 1.5."),
        ({"max_tokens": 1}, "max_tokens must be at least 2 but got 1."),
        ({"max_tokens": 10**9}, "max_tokens must be at most 10000000 but got 1000000000."),
        ({"delta": 1}, "delta must be above 0 and below 1 but got 1."),
        ({"epsilon": 0}, "epsilon must be above 0 and below 1 but got 0."),
        ({"metric": "rouge"}, "metric must be of lcs, differs but got 'rouge'."),
        ({"decay": -1}, "decay must be 0 to 1e+06 but got -1.0."),
        ({"decay": math.nan}, "decay must be 0 to 1e+06 but got nan."),
        ({"thresholds": []}, "thresholds must be 1 to 1000 numbers, each below the one before, "),
        ({"thresholds": [0.5, 0.5]}, "each below the one before, but got [0.5, 0.5]."),
        ({"thresholds": [0.1, 0.5]}, "each below the one before, but got [0.1, 0.5]."),
        ({"thresholds": [1.1, 0.5]}, "thresholds must be from 1 down to 0 but got [1.1, 0.5]."),
        ({"thresholds": [math.nan]}, "thresholds must be from 1 down to 0 but got [nan]."),
        ({"thresholds": ["a"]}, "thresholds must be a number but got 'a'."),
    ],
)
def test_settings_that_are_impossible(change: dict[str, Any], message: str) -> None:
    own: dict[str, Any] = {
        "layer": 6,
        "delta": 0.1,
        "epsilon": 0.05,
        "metric": "lcs",
        "thresholds": THRESHOLDS,
        "decay": 4.0,
        "max_tokens": 64,
    }
    check_settings(**own)
    with pytest.raises(ValueError) as error:
        calibrate(PROMPTS, **{**own, **change})
    assert str(error.value).startswith("[calibrate] ") and message in str(error.value)


def test_prompts_and_seeds_that_are_impossible() -> None:
    for change, message in (
        ({"layer": 24}, r"must leave a layer of the target's 24 out but got 24\.$"),
        ({"layer": 6, "prompts": []}, r"prompts must be 1 to 10000000 but got 0\.$"),
        (
            {"layer": 6, "sampling": Sampling(seed=2**32 - 2)},
            r"seed must be at most 4294967295 for the last of 3 prompts but got 4294967294 for ",
        ),
    ):
        ask: dict[str, Any] = {"prompts": PROMPTS[:3], **change}
        with pytest.raises(ValueError, match=message):
            calibrate(**ask)
