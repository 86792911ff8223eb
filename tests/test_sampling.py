"""The filter against a plain NumPy form, and the residual rule by exact enumeration."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from pyengine.sampling import (
    Distribution,
    Purpose,
    Sampling,
    accept_probability,
    accept_residual,
    draw,
    draw_plain,
    filter_logits,
    residual,
    uniforms,
)


def filter_numpy(row: np.ndarray, s: Sampling) -> np.ndarray:
    """The definition, one row, float64: probabilities by token id."""
    logits = row.astype(np.float64).copy()
    logits[list(s.suppress_tokens)] = -np.inf
    if s.greedy:
        return np.eye(len(row))[int(np.argmax(logits))]
    logits = logits / np.float32(s.temperature)
    order = sorted(range(len(row)), key=lambda i: (-logits[i], i))[: s.top_k or len(row)]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    if s.top_p < 1:
        p = np.where(np.concatenate([[0], np.cumsum(p)[:-1]]) < s.top_p, p, 0)
    p = np.where(p >= s.min_p * p[0], p, 0)
    out = np.zeros(len(row))
    out[order] = p / p.sum()
    return out


def by_id(dist: Distribution, vocab: int) -> np.ndarray:
    out = np.zeros((dist.ids.shape[0], vocab))
    np.put_along_axis(out, np.array(dist.ids), np.array(dist.probs), axis=-1)
    return out


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_k=0),
    Sampling(top_p=1.0, top_k=0),
    Sampling(top_p=1.0, top_k=7),
    Sampling(top_p=0.3, top_k=1),
    Sampling(min_p=0.2),
    Sampling(temperature=0.0),
    Sampling(suppress_tokens=(3, 90)),
    Sampling(temperature=0.0, suppress_tokens=(3,)),
]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_filter_equals_definition(s: Sampling) -> None:
    logits = np.random.default_rng(3).normal(0, 3, (5, 97)).astype(np.float32)
    got = by_id(filter_logits(mx.array(logits), s), 97)
    want = np.stack([filter_numpy(row, s) for row in logits])
    assert np.allclose(got, want, atol=2e-6)
    assert np.array_equal(got > 0, want > 0)


def test_filter_breaks_ties_by_lower_id() -> None:
    logits = mx.array([[0.0, 2.0, -0.0, 2.0, 0.0, -5.0]])
    dist = filter_logits(logits, Sampling(top_k=4, top_p=1.0))
    assert dist.ids.tolist() == [[1, 3, 0, 2]]
    assert filter_logits(logits, Sampling(temperature=0.0)).ids.tolist() == [[1]]


def test_filter_orders_negative_and_infinite_logits() -> None:
    logits = mx.array([[-3.0, -mx.inf, -1.0, 1e30, -1e-30, 1e-30]])
    dist = filter_logits(logits, Sampling(top_k=0, top_p=1.0))
    assert dist.ids.tolist() == [[3, 5, 4, 2, 0, 1]]


def test_filter_keeps_first_when_top_p_is_tiny() -> None:
    dist = filter_logits(mx.array([[1.0, 1.0, 1.0]]), Sampling(top_p=1e-6))
    assert by_id(dist, 3).tolist() == [[1.0, 0.0, 0.0]]


def test_filter_with_one_allowed_token() -> None:
    s = Sampling(suppress_tokens=(0, 1, 3))
    assert by_id(filter_logits(mx.zeros((1, 4)), s), 4).tolist() == [[0, 0, 1, 0]]


def test_filter_rows_do_not_see_each_other() -> None:
    logits = mx.array(np.random.default_rng(5).normal(0, 2, (6, 300)).astype(np.float32))
    together = filter_logits(logits, Sampling())
    for i in range(6):
        alone = filter_logits(logits[i : i + 1], Sampling())
        assert together.ids[i].tolist() == alone.ids[0].tolist()
        assert together.probs[i].tolist() == alone.probs[0].tolist()


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"temperature": -1.0}, "[sampling] temperature must be 0 or more but got -1.0."),
        ({"temperature": math.nan}, "[sampling] temperature must be 0 or more but got nan."),
        ({"top_p": 0.0}, "[sampling] top_p must be above 0 and at most 1 but got 0.0."),
        ({"top_k": 257}, "[sampling] top_k must be 0 (off) to 256 but got 257."),
        ({"min_p": 1.0}, "[sampling] min_p must be 0 or more and below 1 but got 1.0."),
        ({"seed": 2**32}, "[sampling] seed must be 0 to 4294967295 but got 4294967296."),
        ({"suppress_tokens": (-1,)}, "[sampling] suppress_tokens must be token ids but got [-1]."),
    ],
)
def test_settings_are_checked(kw: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        Sampling(**kw)
    assert str(error.value) == text


def test_draw_inverts_the_distribution() -> None:
    ids = mx.array([[4, 2, 9]])
    probs = mx.array([[0.5, 0.0, 0.5]])
    for u, token in [(0.0, 4), (0.499, 4), (0.5, 9), (1 - 2**-24, 9)]:
        assert draw(Distribution(ids, probs), mx.array([u])).item() == token


def test_draw_plain_follows_the_distribution() -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    dist = Distribution(mx.array([[3, 0, 2, 1]]), mx.array(probs[None].astype(np.float32)))
    s, runs = Sampling(seed=11), 4000
    tokens = [draw_plain(dist, s, mx.array(i)) for i in range(runs)]
    counts = np.bincount(np.array(mx.concatenate(tokens)), minlength=4)[[3, 0, 2, 1]]
    chi2 = float(((counts - runs * probs) ** 2 / (runs * probs)).sum())
    assert chi2 < 16.27  # 3 degrees of freedom, p = 0.001; fixed seed


def test_uniforms_differ_by_purpose_position_and_seed() -> None:
    seen = set()
    for seed, purpose, position in itertools.product((0, 1), Purpose, (0, 1, 70000)):
        seen.add(tuple(uniforms(seed, purpose, mx.array(position), 4).tolist()))
    assert len(seen) == 2 * len(Purpose) * 3
    assert len({u for row in seen for u in row}) == 4 * len(seen)


# The joint distribution of what a round commits, by enumeration over every draft path.


def random_tree(rng: np.random.Generator, vocab: int, depth: int) -> dict[tuple, np.ndarray]:
    """A distribution for every prefix of fewer than ``depth`` tokens, some with empty cells."""
    tree = {}
    for n in range(depth):
        for prefix in itertools.product(range(vocab), repeat=n):
            p = rng.dirichlet(np.full(vocab, 0.7))
            if rng.random() < 0.3:
                p[rng.integers(vocab)] = 0
            if rng.random() < 0.1:
                p = np.eye(vocab)[rng.integers(vocab)]
            tree[prefix] = p / p.sum()
    return tree


def committed(p: dict, q: dict, vocab: int, k: int, dtype: mx.Dtype) -> dict[tuple, float]:
    """Probability of every committed token sequence of one round, summed over draft paths."""
    out: dict[tuple, float] = {}
    ids = mx.array(np.arange(vocab, dtype=np.int32))
    for drafts in itertools.product(range(vocab), repeat=k):
        prefixes = [drafts[:i] for i in range(k + 1)]
        reach = math.prod(q[prefixes[i]][drafts[i]] for i in range(k))
        if reach == 0:
            continue

        def rows(tree: dict, some: list) -> Distribution:
            table = np.stack([tree[prefix] for prefix in some])
            broadcast = mx.broadcast_to(ids, table.shape)
            return Distribution(broadcast, mx.array(table, dtype=dtype))

        target, assistant = rows(p, prefixes), rows(q, prefixes[:k])
        h = np.array(accept_probability(target, assistant, mx.array(drafts, dtype=mx.int32)))
        after = np.array(residual(target, assistant, vocab).probs)
        alive = reach
        for i in range(k + 1):
            refused = alive * (1 - h[i]) if i < k else alive
            for x in range(vocab):
                key = (*drafts[:i], x)
                out[key] = out.get(key, 0.0) + refused * after[i, x]
            alive = alive * h[i] if i < k else 0
    return out


def total_variation(p: dict, q: dict, vocab: int, k: int, dtype: mx.Dtype) -> float:
    """Gap between the target's law of k + 1 tokens and a round's, continued from the target."""
    got = dict.fromkeys(itertools.product(range(vocab), repeat=k + 1), 0.0)
    for tokens, mass in committed(p, q, vocab, k, dtype).items():
        for rest in itertools.product(range(vocab), repeat=k + 1 - len(tokens)):
            whole = tokens + rest
            more = math.prod(p[whole[:i]][whole[i]] for i in range(len(tokens), k + 1))
            got[whole] += mass * more
    want = {s: math.prod(p[s[:i]][s[i]] for i in range(k + 1)) for s in got}
    return 0.5 * sum(abs(got[s] - want[s]) for s in got)


CASES = [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2)]


@pytest.mark.parametrize(("vocab", "k"), CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(mx.float64, 1e-12), (mx.float32, 1e-6)])
def test_residual_rule_is_exact(vocab: int, k: int, dtype: mx.Dtype, bound: float) -> None:
    rng = np.random.default_rng(100 * vocab + k)
    with mx.stream(mx.cpu):
        for _ in range(4):
            p, q = random_tree(rng, vocab, k + 1), random_tree(rng, vocab, k + 1)
            assert total_variation(p, q, vocab, k, dtype) <= bound
        assert total_variation(p, p, vocab, k, dtype) <= bound


@pytest.mark.parametrize("fault", ["unfiltered q", "no residual", "always accept"])
def test_enumeration_sees_a_broken_rule(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    here = sys.modules[__name__]
    rng = np.random.default_rng(9)
    p, q = random_tree(rng, 3, 3), random_tree(rng, 3, 3)
    if fault == "unfiltered q":
        real = accept_probability
        flat = lambda d: Distribution(d.ids, 0.5 * d.probs + 0.5 / 3)  # noqa: E731
        monkeypatch.setattr(here, "accept_probability", lambda p, q, d: real(p, flat(q), d))
    elif fault == "no residual":
        monkeypatch.setattr(here, "residual", lambda p, q, vocab: p)
    else:
        monkeypatch.setattr(here, "accept_probability", lambda p, q, d: mx.ones(d.shape[0]))
    with mx.stream(mx.cpu):
        assert total_variation(p, q, 3, 2, mx.float64) > 0.01


def one_row(table: list[list[float]]) -> Distribution:
    probs = mx.array(table)
    return Distribution(mx.broadcast_to(mx.arange(probs.shape[1]), probs.shape), probs)


def test_accept_follows_the_given_uniforms() -> None:
    p = one_row([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0]])
    q = one_row([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]])
    drafts = mx.array([0, 0], mx.int32)

    def run(u_accept: list[float], u_correct: list[float]) -> tuple[int, int]:
        accepted, token = accept_residual(
            p, q, drafts, mx.array(u_accept), mx.array(u_correct), vocab=3
        )
        return accepted.item(), token.item()

    assert run([0.5, 0.0], [0.9, 0.9, 0.9]) == (0, 1)  # u < h is strict; (p - q)+ is token 1
    assert run([0.49, 0.5], [0.9, 0.0, 0.9]) == (1, 2)  # (p - q)+ is token 2
    assert run([0.49, 0.49], [0.0, 0.0, 0.3]) == (2, 1)  # bonus
    assert run([0.5, 0.49], [0.0, 0.0, 0.0]) == (0, 1)  # a later pass does not count


def test_greedy_rows_accept_only_the_argmax() -> None:
    p = Distribution(mx.array([[7], [3], [5]], mx.int32), mx.ones((3, 1)))
    q = Distribution(mx.array([[7], [4]], mx.int32), mx.ones((2, 1)))
    almost_one = mx.full((3,), 1 - 2**-24)
    accepted, token = accept_residual(
        p, q, mx.array([7, 4], mx.int32), almost_one[:2], almost_one, vocab=9
    )
    assert (accepted.item(), token.item()) == (1, 3)
