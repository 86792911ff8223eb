"""Settings that must win, in the engine: what is suppressed before every bias, one fixed order of
edits and filters where two orders differ, and every bit of a seed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import decode
from one_text import filter_alone
from reading import read_request
from test_loop import MarkovAssistant, MarkovTarget, random_table
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

from pyengine import cli, ops
from pyengine.engine.stats import Stats
from pyengine.generation import Stream, generate
from pyengine.ops.accept_block import RULES, Rule
from pyengine.sampling.sampler import Sampler
from pyengine.sampling.settings import MAX_EDIT, Sampling
from pyengine.serve.protocols.ask import Limits
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

LN2 = math.log(2)


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


@pytest.fixture(params=["native", "reference"])
def both(request: pytest.FixtureRequest) -> Iterator[str]:
    """On both implementations of the ops, whichever the run asks for."""
    before = ops.dispatch.chosen()
    ops.use(request.param)
    yield request.param
    ops.use(before)


def law(
    logits: list[float],
    *,
    prompt: list[int] | None = None,
    text: list[int] | None = None,
    **kw: Any,
) -> list[float]:
    """Probabilities by id of the token after a prompt and a text; where nothing else is said, with
    no filter."""
    settings = Sampling(**{"top_k": 0, "top_p": 1.0, **kw})
    sampler = Sampler(settings, [*(prompt or [])], len(logits))
    sampler.add(text or [])
    got = filter_alone(sampler, mx.array([logits]))
    out = [0.0] * len(logits)
    for token, prob in zip(got.ids[0].tolist(), got.probs[0].tolist(), strict=True):
        out[token] += prob
    return out


def logs(*weights: float) -> list[float]:
    """Logits of tokens that weigh so much."""
    return [math.log(weight) for weight in weights]


# Each by hand, with what the other order would give
ORDERS: list[tuple[str, list[float], dict[str, Any], list[float]]] = [
    # 2 ln 2 / 2 + ln 4 = ln 8; the bias first: (2 ln 2 + ln 4) / 2 = ln 4
    (
        "repetition before bias",
        [2 * LN2, 0.0],
        {"prompt": [0], "repetition_penalty": 2.0, "logit_bias": {0: math.log(4)}},
        [8 / 9, 1 / 9],
    ),
    # -2 ln 2 * 2 + 7 ln 2 = ln 8; the bias first: (-2 ln 2 + 7 ln 2) / 2 = 2.5 ln 2
    (
        "repetition of a negative logit before bias",
        [-2 * LN2, 0.0],
        {"prompt": [0], "repetition_penalty": 2.0, "logit_bias": {0: 7 * LN2}},
        [8 / 9, 1 / 9],
    ),
    # 4 ln 2 / 2 - ln 2 = ln 2; the penalty first: (4 ln 2 - ln 2) / 2 = 1.5 ln 2
    (
        "repetition before presence",
        [4 * LN2, 0.0],
        {"text": [0], "repetition_penalty": 2.0, "presence_penalty": LN2},
        [2 / 3, 1 / 3],
    ),
    # Once by presence, twice by frequency: ln 16 - ln 2 - 2 ln 2 = ln 2
    (
        "presence and frequency add up",
        [4 * LN2, 0.0],
        {"text": [0, 0], "presence_penalty": LN2, "frequency_penalty": LN2},
        [2 / 3, 1 / 3],
    ),
    # Only of the text: the prompt's own do not count
    (
        "presence and frequency of the text alone",
        logs(2, 1),
        {"prompt": [0, 0], "presence_penalty": 5.0, "frequency_penalty": 5.0},
        [2 / 3, 1 / 3],
    ),
    # A bias of ln 2 at temperature 1/2 is a factor of 4; after the temperature 2
    (
        "bias before temperature",
        [0.0, 0.0],
        {"logit_bias": {1: LN2}, "temperature": 0.5},
        [1 / 5, 4 / 5],
    ),
    (
        "penalty before temperature",
        [0.0, 0.0],
        {"text": [0], "presence_penalty": LN2, "temperature": 0.5},
        [1 / 5, 4 / 5],
    ),
    ("bias before greed", [3.0, 1.0, 2.0], {"logit_bias": {1: 2.5}, "temperature": 0.0}, [0, 1, 0]),
    # Candidates are counted after the edits: token 2 takes a place, token 0 leaves one
    (
        "bias before top-k",
        logs(4, 3, 2, 1),
        {"logit_bias": {2: math.log(4)}, "top_k": 2},
        [1 / 3, 0, 2 / 3, 0],
    ),
    (
        "suppression before top-k",
        logs(4, 3, 2, 1),
        {"suppress_tokens": (0,), "top_k": 2},
        [0, 3 / 5, 2 / 5, 0],
    ),
    (
        "suppression before greed",
        logs(4, 3, 2, 1),
        {"suppress_tokens": (0, 1), "temperature": 0.0},
        [0, 0, 1, 0],
    ),
    # At 1/2 the first has 16 / 30, above 0.53; at 1 it has 0.4
    (
        "temperature before top-p",
        logs(4, 3, 2, 1),
        {"temperature": 0.5, "top_p": 0.53},
        [1, 0, 0, 0],
    ),
    # The second has 3 / 4 of the best at 1, 9 / 16 at 1/2
    (
        "temperature before min-p",
        logs(4, 3, 2, 1),
        {"temperature": 0.5, "min_p": 0.6},
        [1, 0, 0, 0],
    ),
    # Of the best two the first has 4 / 7, above 0.5; of all it has 0.4
    ("top-k before top-p", logs(4, 3, 2, 1), {"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
    # Three by top-p (0.4 + 0.3 < 0.75), and each has half of the best; min-p first would leave
    # three too, of which the first two have 7 / 9, above 0.75
    (
        "top-p before min-p",
        logs(4, 3, 2, 1),
        {"top_p": 0.75, "min_p": 0.45},
        [4 / 9, 3 / 9, 2 / 9, 0],
    ),
    # What is dropped lifts what stays, last of all
    ("renormalised at the end", logs(4, 3, 2, 1), {"min_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),
    (
        "suppression before top-p",
        logs(4, 3, 2, 1),
        {"suppress_tokens": (0,), "top_p": 0.5},
        [0, 1, 0, 0],
    ),
    (
        "suppression before min-p",
        logs(8, 3, 2, 1),
        {"suppress_tokens": (0,), "min_p": 0.6},
        [0, 0.6, 0.4, 0],
    ),
    # The best after the edits is what others are measured by
    (
        "bias before min-p",
        logs(4, 3, 2, 1),
        {"logit_bias": {3: math.log(8)}, "min_p": 0.45},
        [1 / 3, 0, 0, 2 / 3],
    ),
]


@pytest.mark.parametrize(
    ("logits", "kw", "want"), [row[1:] for row in ORDERS], ids=[row[0] for row in ORDERS]
)
def test_the_order_of_edits_and_filters(
    both: str, logits: list[float], kw: dict[str, Any], want: list[float]
) -> None:
    assert law(logits, **kw) == pytest.approx(want, abs=1e-6)


LIFTED: list[dict[str, Any]] = [
    {"logit_bias": {5: MAX_EDIT}},
    {"logit_bias": {5: 80.0}},
    {"logit_bias": {5: 80.0, 3: 1.0, 9: -1.0}, "presence_penalty": -2.0},
    {"presence_penalty": -MAX_EDIT},
    {"frequency_penalty": -MAX_EDIT},
    {"repetition_penalty": 1 / MAX_EDIT},
    {"repetition_penalty": MAX_EDIT, "logit_bias": {5: MAX_EDIT}},
]


@pytest.mark.parametrize("kw", LIFTED, ids=str)
def test_what_is_suppressed_wins_over_every_edit(both: str, kw: dict[str, Any]) -> None:
    """Greedily too, and although it stands in prompt and text."""
    logits = [1.0] * 5 + [50.0] + [1.0] * 6
    for temperature in (0.0, 1.0):
        said = {"prompt": [5], "text": [5, 5], "temperature": temperature, **kw}
        assert law(logits, **said)[5] == 1.0  # what the edits would have
        assert law(logits, suppress_tokens=(5, 7), **said)[5] == 0.0


@pytest.mark.parametrize("kw", LIFTED[:3], ids=str)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_suppressed_is_never_said(
    kw: dict[str, Any], block_size: int, temperature: float
) -> None:
    """Nor drafted: an assistant that is the target errs nowhere."""
    target, assistant = MarkovTarget(random_table(1)), MarkovAssistant(random_table(1))
    settings = Sampling(temperature, seed=3, suppress_tokens=(5, 11), **kw)
    stats = Stats()
    said = [
        token
        for r in decode(
            target,
            assistant,
            [5, 11, 2],
            sampling=settings,
            block_size=block_size,
            max_tokens=60,
            stats=stats,
        )
        for token in r.tokens
    ]
    assert len(said) == 60 and not {5, 11} & {*said} and len({*said}) > 1
    assert stats.accepted == stats.drafted == (block_size - 1) * stats.rounds


def test_the_pairs_suppressed_tokens_win_over_a_callers_bias(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every way a bias comes in; the token is one the pair would say."""
    pair = script_pair(tok, "jumps over a lazy dog")
    token = pair.target.script[0]
    bias = {token: MAX_EDIT}
    assert generate("fox", pair=pair, max_tokens=1).tokens == [token]
    pair.generation.suppress_tokens = (token,)
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    told = []
    for sampling in (
        {"logit_bias": bias, "seed": 1},
        Sampling(logit_bias=bias, seed=1),
        Sampling(0.0, logit_bias=bias),
    ):
        told.append(generate("fox", pair=pair, sampling=sampling, max_tokens=5).tokens)
    words = ["generate", "fox", "--json", "--max-tokens=5", "--seed=1"]
    words.append(f"--logit-bias={token}={MAX_EDIT}")
    told.append(json.loads(CliRunner().invoke(cli.app, words).stdout)["tokens"])
    body = {"prompt": "fox", "max_tokens": 5, "seed": 1, "logit_bias": {str(token): MAX_EDIT}}
    running = Stream(read_request(pair, body, Limits(), chat=False).task(), None)
    list(running)
    told.append(running.result.tokens)
    assert [len(tokens) for tokens in told] == [5] * 5
    assert not any(token in tokens for tokens in told)


# Seeds


def philox(counter: list[int], key: list[int]) -> float:
    """Philox 4x32-10 in whole numbers, as its paper has it: the first word's upper 24 bits."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return (c[0] >> 8) / (1 << 24)


EVEN = np.zeros((16, 16))
OPEN: dict[str, Any] = {"top_k": 0, "top_p": 1.0}


def text_of(seed: int, block_size: int = 1, rule: Rule = "residual", count: int = 12) -> list[int]:
    """Tokens after a prompt of three, every one of 16 as likely."""
    target, assistant = MarkovTarget(EVEN), MarkovAssistant(random_table(2))
    settings = Sampling(seed=seed, verify=rule, **OPEN)
    kw: Any = {"sampling": settings, "block_size": block_size, "max_tokens": count}
    return [token for r in decode(target, assistant, [1, 2, 3], **kw) for token in r.tokens]


@pytest.mark.parametrize("seed", [0, 1, 77, 2**16, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1])
def test_a_seed_is_the_whole_key(seed: int) -> None:
    """Plain text by the definition: at each place the token whose number is the smallest."""
    want = [
        min(range(16), key=lambda token: philox([place, token, 0, 0], [seed, 0]))
        for place in range(3, 15)
    ]
    assert text_of(seed) == want
    assert text_of(seed, 4, "coupled") == want


@pytest.mark.parametrize(("block_size", "rule"), [(1, "residual"), *((4, r) for r in RULES)])
def test_every_bit_of_a_seed_matters(block_size: int, rule: Rule) -> None:
    seeds = [0, *(1 << bit for bit in range(32))]
    texts = {tuple(text_of(seed, block_size, rule)) for seed in seeds}
    assert len(texts) == 33


@pytest.mark.parametrize("rule", ["residual", "block"])
def test_every_bit_of_a_seed_matters_to_what_is_accepted(rule: Rule) -> None:
    """The same drafts of even odds: their number, and what follows them, are the seed's."""
    vocab, k = 16, 3
    ids = mx.broadcast_to(mx.arange(vocab, dtype=mx.int32), (k + 1, vocab))
    q = mx.ones((k, vocab)) / vocab
    p = mx.array(np.random.default_rng(0).dirichlet([1] * vocab, k + 1).astype(np.float32))
    seen = []
    for bit, position in itertools.product(range(32), range(12)):
        pair = [
            ops.accept_block(
                *(ids, p, ids[:k], q, mx.array([1, 2, 3]), mx.array([position])),
                mx.array([seed], dtype=mx.uint32),
                mx.array([RULES.index(rule)]),
                counts=(k + 1,),
                vocab=vocab,
            )
            for seed in (0, 1 << bit)
        ]
        seen.append((bit, *([a.tolist() for a in part] for part in pair)))
    for bit in range(32):
        assert any(a != b for at, a, b in seen if at == bit), bit


@pytest.mark.parametrize("seed", [2**32, 2**32 + 5, 2**63, 2**64 - 1, -1])
def test_a_longer_seed_is_refused_and_not_cut(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Wherever it comes in: its low bits are another seed."""
    pair = script_pair(tok, "jumps")
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    said = f"[sampling] seed must be 0 to 4294967295 but got {seed}."
    for refused in (
        lambda: Sampling(seed=seed),
        lambda: generate("fox", pair=pair, sampling={"seed": seed}),
        lambda: read_request(pair, {"prompt": "fox", "seed": seed}, Limits(), chat=False),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        assert str(error.value) == said
    for words in (["generate", "fox"], ["chat"], ["bench", "gemma-mtp"]):
        done = CliRunner().invoke(cli.app, [*words, f"--seed={seed}"], input="fox\n")
        assert (done.exit_code, done.stdout) == (2, "") and said in done.stderr


def test_the_last_seed_of_a_bench(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """It adds 1 for each prompt: two prompts reach the largest seed, and three go past it."""
    pair = script_pair(tok, "jumps")
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    row = {"category": "c", "prompt": "fox", "max_tokens": 4}
    rows = [json.dumps({"id": f"case {i}", **row}) for i in range(3)]
    codes = []
    for count in (2, 3):
        (suite := tmp_path / "suite.jsonl").write_text("\n".join(rows[:count]))
        words = ["bench", "gemma-mtp", "--allow-unverified-gemma", f"--seed={2**32 - 2}"]
        words += ["--repeats=1", "--block-sizes=2", f"--prompt-suite={suite}"]
        output = tmp_path / f"{count}.json"
        codes.append(CliRunner().invoke(cli.app, [*words, f"--output={output}"]).exit_code)
    assert codes == [0, 2] and not (tmp_path / "3.json").exists()
    seeds = [row["seed"] for row in json.loads((tmp_path / "2.json").read_text())["rows"]]
    assert seeds == [2**32 - 2] * 2 + [2**32 - 1] * 2
