"""The law of the rules: each implementation against what is worked out by hand and by enumeration.

`rules_by_hand` holds the rules once more, from their papers. Its own law is shown to be the
target's; then the processor's kernel, the Metal kernel (in the workbench) and the plain form are
held to it: decision by decision as a function of their uniforms, and by counts over many seeds.
Every comparison says how many of the faults it is meant for it would see.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
import rules_by_hand as hand
from one_text import accept_alone, draw_rows
from rules_by_hand import Close, Hand, Row
from scipy import stats as scipy_stats

from pyengine import _ext, ops
from pyengine.ops.accept_block import RULES, Rows, accept_one

IMPLEMENTATIONS = ("processor", "plain MLX", "Metal")
RANDOM = ("residual", "block")
LEAST = 1e-4  # seeds are fixed; were they drawn, one suite in some hundreds would fail


@contextmanager
def running(implementation: str) -> Iterator[None]:
    names = {"processor": "native", "plain MLX": "reference", "Metal": "workbench"}
    ops.use(names[implementation])
    try:
        yield
    finally:
        ops.use("native")


@dataclass
class Block:
    """A block with drafts that were drawn from q, but by another generator."""

    p: list[Row]
    q: list[Row]
    drafts: list[int]
    position: int
    seed: int
    vocab: int

    @property
    def tables(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Rows by id."""
        return [r.dense(self.vocab) for r in self.p], [r.dense(self.vocab) for r in self.q]

    @functools.cached_property
    def arrays(self) -> list[mx.array]:
        out = []
        for rows in (self.p, self.q):
            out.append(mx.array(np.stack([r.ids for r in rows]).astype(np.int32)))
            out.append(mx.array(np.stack([r.probs for r in rows]).astype(np.float32)))
        return [*out, mx.array(self.drafts, dtype=mx.int32)]

    def by_hand(self, rule: str) -> tuple[int, int]:
        return hand.decide(rule, self.p, self.q, self.drafts, self.position, self.seed, self.vocab)

    def run(self, rule: str) -> tuple[mx.array, mx.array]:
        at = mx.array(self.position), mx.array(self.seed, dtype=mx.uint32)
        return accept_alone(*self.arrays, *at, rule=rule, vocab=self.vocab)


def near_block(
    rng: np.random.Generator, k: int, n: int, m: int, tilt: float, *, shared: bool = False
) -> Block:
    """q is p, tilted at every candidate: excess all over, of another shape at another scale.

    In a long block only one row is, and the others are next to equal, so that it decides.
    Ids of both overlap as far as n and m let them, in unlike orders. Drafts are drawn from q, by
    another generator or, if the noise is ``shared``, by the block's own.
    """
    vocab = max(n, m) + 5
    position, seed = int(rng.integers(2**20)), int(rng.integers(2**32))
    p, q, drafts = [], [], []
    far = int(rng.integers(k))
    for i in range(k + 1):
        ids = rng.permutation(vocab)
        row = rounded(ids[:n], -np.sort(-rng.dirichlet(np.full(n, rng.choice([1.0, 20.0])))))
        other = rng.permutation(ids[: max(n, m)])[:m]
        base = np.where(row.dense(vocab)[other] > 0, row.dense(vocab)[other], 1 / m)
        sigma = tilt if k < 10 or i == far else 0.01
        guess = rounded(other, base * np.exp(sigma * rng.normal(size=m)))
        p.append(row)
        q.append(guess)
        if shared:
            drafts.append(hand.race(guess, position + 1 + i, seed))
        else:
            drafts.append(int(rng.choice(other, p=guess.probs / guess.probs.sum())))
    return Block(p, q[:k], drafts[:k], position, seed, vocab)


def rounded(ids: np.ndarray, weights: np.ndarray) -> Row:
    """Probabilities that are float32's, in float64."""
    return Row(ids, (weights / weights.sum()).astype(np.float32).astype(np.float64))


# (k, n, m), the tilt, how many: lanes of a simdgroup in part and more than once, rows past them
SHAPES = [
    ((1, 4, 4), 1.0, 20),
    ((2, 5, 7), 0.7, 60),
    ((3, 20, 20), 0.8, 90),
    ((4, 64, 64), 0.7, 50),
    ((6, 33, 31), 0.5, 60),
    ((7, 70, 40), 0.5, 30),
    ((3, 256, 200), 0.7, 20),
    ((40, 12, 12), 1.0, 30),
]


@functools.cache
def blocks(rule: str) -> list[Block]:
    rng = np.random.default_rng(20)
    shared = rule == "coupled"
    made = [
        near_block(rng, *shape, tilt, shared=shared)
        for shape, tilt, count in SHAPES
        for _ in range(count)
    ]
    if not shared:
        for b in made[::2]:
            find_partial(b, rule)
    return made


def find_partial(b: Block, rule: str) -> None:
    """Look for a seed that keeps some drafts and not all; in `block`, at a scale below 1."""
    rules = hand.by_hand(rule, *b.tables, b.drafts)
    for b.seed in range(40):
        got = decided(lambda: hand.decide_by(rule, rules, b.p, b.position, b.seed))
        partial = got is not None and 0 < got[0] < len(b.drafts)
        if partial and (rule == "residual" or rules.scales[got[0]] < 0.9):
            return


@functools.cache
def expected(rule: str) -> list[tuple[int, int] | None]:
    """Decisions by hand; None where they are too close to call."""
    return [decided(lambda b=b: b.by_hand(rule)) for b in blocks(rule)]


def decided(decide: Callable[[], tuple[int, int]]) -> tuple[int, int] | None:
    try:
        return decide()
    except Close:
        return None


# Faults, as rules by hand that have them.


def unscaled_correction(p: list, q: list, drafts: list[int]) -> Hand:
    right = hand.by_hand("block", p, q, drafts)
    return right._replace(laws=hand.by_hand("residual", p, q, drafts).laws)


def correction_with_the_scale_before(p: list, q: list, drafts: list[int]) -> Hand:
    right = hand.by_hand("block", p, q, drafts)
    scales = [1.0, *right.scales[:-2]]
    laws = [hand.excess(a, b, s) for a, b, s in zip(p, q, scales, strict=False)]
    laws = [law if law.sum() > 0 else row for law, row in zip(laws, p, strict=False)]
    return right._replace(laws=[*laws, p[-1]])


def unscaled_mass(p: list, q: list, drafts: list[int]) -> Hand:
    right = hand.by_hand("block", p, q, drafts)
    mass = [hand.excess(a, b, 1).sum() for a, b in zip(p, q, strict=False)]
    rest = [1 - scale for scale in right.scales]
    inner = [hand.over_rest(mass[i], rest[i]) for i in range(1, len(drafts))]
    return right._replace(chances=[*inner, right.chances[-1]])


def scale_not_capped(p: list, q: list, drafts: list[int]) -> Hand:
    right, scales = hand.by_hand("block", p, q, drafts), [1.0]
    for i, d in enumerate(drafts):
        scales.append(scales[-1] * p[i][d] / q[i][d])
    laws = [hand.excess(a, b, s) for a, b, s in zip(p, q, scales, strict=False)]
    laws = [law if law.sum() > 0 else row for law, row in zip(laws, p, strict=False)]
    return right._replace(laws=[*laws, p[-1]])


def chance_is_the_scale(p: list, q: list, drafts: list[int]) -> Hand:
    right = hand.by_hand("block", p, q, drafts)
    return right._replace(chances=right.scales[1:])


def correction_is_the_targets(p: list, q: list, drafts: list[int]) -> Hand:
    return hand.by_hand("block", p, q, drafts)._replace(laws=p)


def correction_of_the_assistant(p: list, q: list, drafts: list[int]) -> Hand:
    right = hand.by_hand("block", p, q, drafts)
    laws = [hand.excess(b, a, 1) for a, b in zip(p, q, strict=False)]
    laws = [law if law.sum() > 0 else row for law, row in zip(laws, p, strict=False)]
    return right._replace(laws=[*laws, p[-1]])


FAULTS = (
    unscaled_correction,
    correction_with_the_scale_before,
    unscaled_mass,
    scale_not_capped,
    chance_is_the_scale,
    correction_is_the_targets,
    correction_of_the_assistant,
)


# The rules by hand keep the target's law.


def random_tree(rng: np.random.Generator, vocab: int, depth: int) -> dict[tuple, np.ndarray]:
    """A distribution for every prefix of fewer than ``depth`` tokens; some lack a token."""
    tree = {}
    for n in range(depth):
        for prefix in itertools.product(range(vocab), repeat=n):
            p = rng.dirichlet(np.full(vocab, 0.8)) * (rng.random(vocab) > 0.1)
            tree[prefix] = p / p.sum() if p.sum() > 0 else np.eye(vocab)[rng.integers(vocab)]
    return tree


def tilted_trees(seed: int) -> tuple[dict, dict]:
    """A target of three tokens, four deep, and an assistant that is off in every row."""
    rng = np.random.default_rng(seed)
    p = random_tree(rng, 3, 4)
    off = {s: row * np.exp(rng.normal(size=3)) for s, row in p.items()}
    return p, {s: row / row.sum() for s, row in off.items()}


def completed(tree: dict, vocab: int, k: int, committed: dict[tuple, float]) -> dict:
    """What a round commits, gone on with by the target: the law of k + 1 tokens."""
    whole = dict.fromkeys(itertools.product(range(vocab), repeat=k + 1), 0.0)
    for tokens, mass in committed.items():
        for rest in itertools.product(range(vocab), repeat=k + 1 - len(tokens)):
            text = (*tokens, *rest)
            more = math.prod(tree[text[:i]][text[i]] for i in range(len(tokens), k + 1))
            whole[text] += mass * more
    return whole


def committed(
    p: dict, q: dict, vocab: int, k: int, rules: Callable[..., Hand], rule: str
) -> dict[tuple, float]:
    """The law of what a round commits, over every block of drafts."""
    out: dict[tuple, float] = {}
    for drafts in itertools.product(range(vocab), repeat=k):
        mass = math.prod(q[drafts[:i]][drafts[i]] for i in range(k))
        if mass == 0:
            continue
        rows = [p[drafts[:i]] for i in range(k + 1)], [q[drafts[:i]] for i in range(k)]
        law = hand.outcomes(rule, rules(*rows, list(drafts)))
        for (n, token), chance in law.items():
            key = (*drafts[:n], token)
            out[key] = out.get(key, 0.0) + mass * chance
    return out


def law_of(tree: dict, vocab: int, k: int) -> dict[tuple, float]:
    return completed(tree, vocab, k, {(): 1.0})


def rules_of(rule: str) -> Callable[..., Hand]:
    return functools.partial(hand.by_hand, rule)


@pytest.mark.parametrize("rule", RANDOM)
@pytest.mark.parametrize(("vocab", "k"), [(2, 1), (2, 3), (3, 2), (4, 2), (3, 3)])
def test_rules_by_hand_keep_the_targets_law(vocab: int, k: int, rule: str) -> None:
    rng = np.random.default_rng(10 * vocab + k)
    for _ in range(5):
        p, q = random_tree(rng, vocab, k + 1), random_tree(rng, vocab, k + 1)
        got = completed(p, vocab, k, committed(p, q, vocab, k, rules_of(rule), rule))
        want = law_of(p, vocab, k)
        assert max(abs(got[text] - want[text]) for text in want) < 1e-12


def test_rules_by_hand_accept_what_the_paper_says() -> None:
    """Its example: 10 / 9 tokens by single tokens, 11 / 9 by the block."""
    p, q = (np.array([1, 2]) / 3, np.array([2, 1]) / 3)
    trees = [
        {s: x for n in range(3) for s in itertools.product(range(2), repeat=n)} for x in (p, q)
    ]
    for rule, want in (("residual", 10 / 9), ("block", 11 / 9)):
        law = committed(*trees, 2, 2, rules_of(rule), rule)
        assert math.isclose(sum((len(s) - 1) * mass for s, mass in law.items()), want)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_faults_by_hand_break_the_law(fault: Callable[..., Hand]) -> None:
    p, q = tilted_trees(4)
    got = completed(p, 3, 3, committed(p, q, 3, 3, fault, "block"))
    want = law_of(p, 3, 3)
    assert sum(abs(got[text] - want[text]) for text in want) > 0.01


# Decision by decision.


def wrong_decisions(rule: str, step: int = 1) -> list[tuple]:
    """Of every so manyth block: which, by hand, and what the chosen implementation decided."""
    some = list(zip(blocks(rule), expected(rule), strict=True))[::step]
    out = [b.run(rule) for b, _ in some]
    mx.eval(out)
    got = [(n.item(), token.item()) for n, token in out]
    both = zip((want for _, want in some), got, strict=True)
    return [(i, want, a) for i, (want, a) in enumerate(both) if want and a != want]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decisions_are_those_by_hand(implementation: str, rule: str) -> None:
    with running(implementation):
        assert not wrong_decisions(rule, 2 if implementation == "plain MLX" else 1)


@pytest.mark.parametrize("rule", RULES)
def test_decisions_of_every_instruction_set_are_those_by_hand(rule: str) -> None:
    best = _ext.instruction_set()
    try:
        for name in _ext.instruction_sets():
            _ext.use_instruction_set(name)
            assert not wrong_decisions(rule), name
    finally:
        _ext.use_instruction_set(best)


@pytest.mark.parametrize("rule", RULES)
def test_decisions_have_power(rule: str) -> None:
    """Few are too close to call; from 0 to all drafts are kept; often only some, at a scale."""
    ours = [
        (b, got) for b, got in zip(blocks(rule), expected(rule), strict=True) if got is not None
    ]
    assert len(ours) > 0.98 * len(blocks(rule))
    some = [(b, n) for b, (n, _) in ours if 0 < n < len(b.drafts)]
    assert len({n for _, (n, _) in ours}) > 15 and len(some) > 60
    assert any(n > 32 for _, n in some) or rule == "coupled"
    if rule == "block":
        scaled = [n for b, n in some if hand.by_hand(rule, *b.tables, b.drafts).scales[n] < 0.95]
        assert len(scaled) > 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_decisions_would_show_a_fault(fault: Callable[..., Hand]) -> None:
    """Each fault changes more than one in fifteen, by another token or another draft kept."""
    changed = 0
    for b, right in zip(blocks("block"), expected("block"), strict=True):
        wrong = fault(*b.tables, b.drafts)
        got = decided(lambda w=wrong, b=b: hand.decide_by("block", w, b.p, b.position, b.seed))
        changed += right is not None and got is not None and got != right
    assert changed >= 25, changed


def test_decisions_would_show_a_first_refusal_in_block(monkeypatch: pytest.MonkeyPatch) -> None:
    right = expected("block")
    keep = hand.kept
    monkeypatch.setattr(hand, "kept", lambda rule, passed: keep("residual", passed))
    wrong = [decided(lambda b=b: b.by_hand("block")) for b in blocks("block")]
    assert sum(a != b for a, b in zip(right, wrong, strict=True)) > 40


@pytest.mark.parametrize("rule", RANDOM)
@pytest.mark.parametrize("shape", [(3, 300, 300), (3, 2000, 1500), (4, 40, 1500)])
def test_decisions_on_long_rows(shape: tuple[int, int, int], rule: str) -> None:
    """Past the kernel's limits on Metal; on the processor partners come through a table."""
    rng = np.random.default_rng(sum(shape))
    seen = set()
    for _ in range(30):
        b = near_block(rng, *shape, 0.5)
        want = decided(lambda b=b: b.by_hand(rule))
        if want is not None:
            assert tuple(x.item() for x in b.run(rule)) == want
            seen.add(want[0])
    assert len(seen) > 2


# By counts.

WEIGHED = Block(
    # Ratios 1.5, 2/3, 1/7: a = 1 where 1.5 is cut, 2/3, 2/21; (2/3 p - q)+ of the last row is
    # 5/9, 1/15 and 17/45 where (p - q)+ is 1/2, 1/5 and 3/10
    p=[
        Row(np.array([0, 2, 1, 3]), np.array([0.4, 0.3, 0.2, 0.1])),
        Row(np.array([1, 3, 0, 2]), np.array([0.45, 0.3, 0.2, 0.05])),
        Row(np.array([2, 0, 3, 1]), np.array([0.4, 0.3, 0.2, 0.1])),
        Row(np.array([3, 1, 2, 0]), np.array([0.5, 0.25, 0.15, 0.1])),
    ],
    q=[
        Row(np.array([3, 0, 1, 2]), np.array([0.1, 0.5, 0.2, 0.2])),
        Row(np.array([0, 1, 2, 3]), np.array([0.2, 0.25, 0.1, 0.45])),
        Row(np.array([1, 0, 3, 2]), np.array([0.7, 0.18, 0.02, 0.1])),
    ],
    drafts=[2, 3, 1],
    position=0,
    seed=0,
    vocab=4,
)
RUNS = 4000


def expected_counts(rule: str, rules: Callable[..., Hand] | None = None) -> dict:
    p, q = WEIGHED.tables
    if rule == "coupled":
        return hand.coupled_outcomes(p, WEIGHED.drafts)
    return hand.outcomes(rule, (rules or rules_of(rule))(p, q, WEIGHED.drafts))


def p_value(seen: Counter, law: dict, runs: int) -> float:
    """Chi-square, with cells of fewer than 5 expected in one; an impossible outcome gives 0."""
    if any(law.get(key, 0) == 0 for key in seen):
        return 0.0
    big = [key for key, p in law.items() if p * runs >= 5]
    want = [law[key] * runs for key in big]
    got = [float(seen[key]) for key in big]
    if runs - sum(want) > 1e-6 * runs:
        want.append(runs - sum(want))
        got.append(runs - sum(got))
    return float(scipy_stats.chisquare(got, want).pvalue)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_counts_follow_the_enumerated_law(implementation: str, rule: str) -> None:
    """Half of the runs by seed, half by position."""
    arrays, zero = WEIGHED.arrays, mx.array(0)
    runs = RUNS if implementation == "processor" else RUNS // 4
    keys = [(zero, mx.array(i, dtype=mx.uint32)) for i in range(runs // 2)]
    keys += [(mx.array(8 * i), mx.array(2**31 + 5, dtype=mx.uint32)) for i in range(runs // 2)]
    with running(implementation):
        if implementation == "plain MLX":
            many = [mx.broadcast_to(a, (runs, *a.shape)) for a in arrays]
            at = [mx.stack(list(x)) for x in zip(*keys, strict=True)]
            p, q, drafts = Rows(*many[:2]), Rows(*many[2:4]), many[4]
            n, token = accept_one(rule, p, q, drafts, *at, 4)
            seen = Counter(zip(n.tolist(), token.tolist(), strict=True))
        else:
            out = [accept_alone(*arrays, *key, rule=rule, vocab=4) for key in keys]
            mx.eval(out)
            seen = Counter((n.item(), token.item()) for n, token in out)
    assert p_value(seen, expected_counts(rule), runs) > LEAST


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_counts_would_show_a_fault(fault: Callable[..., Hand]) -> None:
    """What chi-square comes to on average beside a fault, in the shortest of the runs."""
    right, wrong = expected_counts("block"), expected_counts("block", fault)
    right = {x: p for x, p in right.items() if p > 0}
    impossible = any(p > 0.01 and x not in right for x, p in wrong.items())
    beside = sum((wrong.get(x, 0) - p) ** 2 / p for x, p in right.items()) * RUNS / 4
    assert impossible or beside > 2 * scipy_stats.chi2.isf(LEAST, len(right) - 1), beside


# Draws.


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_draws_are_those_by_hand(implementation: str, shared: bool) -> None:
    """Rows of one call lie at places that follow each other, from the index on."""
    rng = np.random.default_rng(8)
    compared = 0
    with running(implementation):
        for n, T, index in itertools.product((1, 7, 33, 100), (1, 4), (0, 1, 5)):
            position, seed = int(rng.integers(2**20)), int(rng.integers(2**32))
            rows = [rounded(rng.permutation(150)[:n], rng.dirichlet(np.ones(n))) for _ in range(T)]
            tokens = draw_rows(
                mx.array(np.stack([r.ids for r in rows]).astype(np.int32)),
                mx.array(np.stack([r.probs for r in rows]).astype(np.float32)),
                mx.array(position),
                mx.array(seed, dtype=mx.uint32),
                index=index,
                shared=shared,
            ).tolist()
            for t, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                try:
                    if shared:
                        want = hand.race(row, position + index + t, seed)
                    else:
                        want = hand.invert(row, hand.uniform(position, index + t, seed, hand.DRAFT))
                except Close:
                    continue
                assert token == want
                compared += 1
    assert compared >= 55  # of 60


# Drafts drawn by the same seed, and the whole law of what follows.


def drawn_texts(rule: str, runs: int) -> Counter:
    """Texts of three tokens: a round of two drafts, and what the target would say after it."""
    p, q = tilted_trees(4)
    ids, shared = mx.arange(3)[None], rule == "coupled"
    rest = np.random.default_rng(13)

    def table(tree: dict, prefixes: list[tuple]) -> mx.array:
        return mx.array(np.array([tree[s] for s in prefixes], np.float32))

    seeds = [mx.array(seed, dtype=mx.uint32) for seed in range(runs)]
    drafts: list[tuple] = [()] * runs
    at = mx.array(40)
    for i in range(2):
        out = [
            draw_rows(ids, table(q, [d]), at, seed, index=i + shared, shared=shared)
            for d, seed in zip(drafts, seeds, strict=True)
        ]
        mx.eval(out)
        drafts = [(*d, x.item()) for d, x in zip(drafts, out, strict=True)]
    three, two = mx.broadcast_to(ids, (3, 3)), mx.broadcast_to(ids, (2, 3))
    out = []
    for d, seed in zip(drafts, seeds, strict=True):
        rows = table(p, [d[:i] for i in range(3)]), table(q, [d[:i] for i in range(2)])
        block = (three, rows[0], two, rows[1], mx.array(d, dtype=mx.int32), at, seed)
        out.append(accept_alone(*block, rule=rule, vocab=3))
    mx.eval(out)
    seen: Counter = Counter()
    for d, (n, token) in zip(drafts, out, strict=True):
        text = (*d[: n.item()], token.item())
        while len(text) < 3:
            text = (*text, int(rest.choice(3, p=p[text])))
        seen[text] += 1
    return seen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("implementation", "runs"), [("processor", 3000), ("Metal", 800)])
def test_drafts_and_what_follows_have_the_targets_law(
    implementation: str, runs: int, rule: str
) -> None:
    """Drafts, uniforms and corrections come from one seed, and must not know of each other."""
    law = {s: mass for s, mass in law_of(tilted_trees(4)[0], 3, 2).items() if mass > 0}
    with running(implementation):
        assert p_value(drawn_texts(rule, runs), law, runs) > LEAST
