"""Keys and values: an arena of pages for many sequences, and the pages of each.

A page is 64 positions of one sequence, in every layer of its kind. Full layers keep all pages;
those of sliding layers are given back when they lie behind the window. A block is written behind
the committed positions, so any tail of it may be refused: rollback is only a length that did not
move. Sequences that begin alike share pages; a page is written by its one holder alone.

Writes happen in place (:func:`pyengine.ops.prepare_qkv`), which is safe under three rules kept
here: the returned handle is the only one; every write depends on the calls that read the arena
before it (:meth:`Arena.note_read`, :meth:`Arena.after_reads`); readers mask by length, so what
lies beyond it, or in a free page, is nothing. On a GPU the second rule orders the commands, and
``block_attention`` tells MLX's encoder that what it reads is in use, so that a later write waits
for it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import count as counted
from typing import NamedTuple

import mlx.core as mx

from pyengine import ops
from pyengine.model.config import LayerConfig, TargetConfig
from pyengine.model.pages import Pages
from pyengine.model.plan import CHUNK
from pyengine.model.rows import packed
from pyengine.ops.prepare_qkv import PAGE

BACK = 16  # positions kept before a window, so that a text may be taken back by as many
# An arena grows by half, from a chunk to this many pages; of large pages by as many as take STEP
MOST_PAGES = 64
LEAST_PAGES = CHUNK // PAGE
STEP = 1 << 28  # bytes
# For every further size graphs are recorded anew, so one of many sequences begins with a chunk of
# each, as long as these take no more than
SMALL = 1 << 25  # bytes
TRIMMED = 2  # times what it would be had it just grown: an arena that is larger may be cut to that


class Placed(NamedTuple):
    """What a round gets of an arena, and of the sequences that it plays."""

    arrays: list[mx.array]
    lengths: mx.array  # int32 [Q]: positions committed
    full: mx.array  # int32 [Q, N]: tables of pages
    sliding: mx.array
    identity: mx.array  # int32 [3], see Arena


class Batch:
    """Sequences of one arena as calls take them: made once for all layers of a round.

    Attributes:
        arena: Where their keys and values are.
        lengths: Positions committed, int32 ``[Q]``.
        tables: By whether layers slide, the sequences' pages, int32 ``[Q, N]``.
    """

    def __init__(self, arena: Arena, lengths: mx.array, tables: Mapping[bool, mx.array]) -> None:
        self.arena, self.lengths, self.tables = arena, lengths, tables
        self._newest: mx.array | None = None
        self._parts: dict[tuple[int, ...], Batch] = {}

    @property
    def newest(self) -> mx.array:
        """Position of each newest committed key, int32 ``[Q]``."""
        if self._newest is None:
            self._newest = self.lengths - 1
        return self._newest

    def rows(self, counts: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Positions of the rows that follow, so many of each sequence, and whose they are: int32
        ``[R]``."""
        owners = mx.array([s for s, T in enumerate(counts) for _ in range(T)], dtype=mx.int32)
        if max(counts) == 1:
            return self.lengths, owners
        steps = mx.array([t for T in counts for t in range(T)], dtype=mx.int32)
        first = self.lengths if len(counts) == 1 else mx.take(self.lengths, owners)
        return first + steps, owners

    def ahead(self, count: int) -> Batch:
        """The same with so many positions more in each, which were written and not committed."""
        return Batch(self.arena, self.lengths + count, self.tables) if count else self

    def part(self, places: Sequence[int]) -> Batch:
        """Those at these places, rising."""
        key, Q = tuple(places), self.lengths.shape[0]
        if len(key) == Q:
            return self
        if key not in self._parts:
            at = slice(len(key)) if key[-1] == len(key) - 1 else mx.array(key, dtype=mx.int32)
            tables = {sliding: table[at] for sliding, table in self.tables.items()}
            self._parts[key] = Batch(self.arena, self.lengths[at], tables)
        return self._parts[key]


class Arena:
    """Keys and values ``[P, K, 64, D]`` of the layers that have their own, for many sequences.

    It holds no pages at first and grows as they are asked for, a layer at a time. ``keys`` and
    ``values`` are lists by layer, None where a layer shares. Behind the target's stand those of a
    drafter's own layers, where one keeps keys and values (:meth:`extend`). ``identity`` is for
    processes that mirror it: a number of its own, and its pages of both kinds; zeros where there
    are none.

    Args:
        config: The target's.
        dtype: Of keys and values.
        most_bytes: It grows to no more than this, page by page; None: to whatever is asked for, and
            by more than a few pages at once.
        sequences: It is likely to hold so many.
    """

    def __init__(
        self,
        config: TargetConfig,
        dtype: mx.Dtype,
        most_bytes: int | None = None,
        sequences: int = 1,
    ) -> None:
        self.config, self.window, self.most_bytes = config, config.window, most_bytes
        self.layers = config.layers  # the target's, and then a drafter's
        self._sequences = sequences
        self.full, self.sliding = Pages(0), Pages(0)
        self.keys: list[mx.array | None] = []
        self.values: list[mx.array | None] = []
        for i, layer in enumerate(config.layers):
            shape = (0, layer.num_kv_heads, PAGE, layer.head_dim)
            own = layer.kv_source == i
            self.keys.append(mx.zeros(shape, dtype) if own else None)
            self.values.append(mx.zeros(shape, dtype) if own else None)
        mx.eval(self.arrays)  # a lazy array belongs to the thread that made it
        self._own_bytes = {
            sliding: sum(
                2 * n.num_kv_heads * PAGE * n.head_dim * dtype.size
                for i, n in enumerate(config.layers)
                if n.kv_source == i and n.sliding == sliding
            )
            for sliding in (False, True)
        }
        self._page_bytes = dict(self._own_bytes)
        self._dtype = dtype
        self._reads: list[mx.array] = []
        self._growing: set[bool] = set()  # kinds that are in the midst of it
        self._changes = counted()
        self._tables: dict[bool, tuple[tuple[int, ...], mx.array]] = {}
        self._batch: Batch | None = None  # of the sequences of a recorded round
        self._identity = mx.array([0, 0, 0], dtype=mx.int32)  # not lazy: for any thread

    @property
    def arrays(self) -> list[mx.array]:
        """Keys and values of all layers."""
        return [a for a in [*self.keys, *self.values] if a is not None]

    @property
    def identity(self) -> mx.array:
        return self._identity

    @property
    def nbytes(self) -> int:
        """Memory of all pages, held or free."""
        return sum(self.pages(kind).count * self.page_bytes(kind) for kind in (False, True))

    @property
    def held_bytes(self) -> int:
        """Memory of the pages that somebody holds."""
        kinds = ((self.pages(kind), self.page_bytes(kind)) for kind in (False, True))
        return sum((pages.count - pages.free) * size for pages, size in kinds)

    def pages(self, sliding: bool) -> Pages:
        return self.sliding if sliding else self.full

    def page_bytes(self, sliding: bool, own: bool = False) -> int:
        """Memory of a page, over all layers of the kind; with ``own`` over the target's alone."""
        return (self._own_bytes if own else self._page_bytes)[sliding]

    @property
    def beside(self) -> tuple[LayerConfig, ...]:
        """A drafter's layers, whose keys and values lie in the pages of the full ones."""
        return self.layers[len(self.config.layers) :]

    def extend(self, layers: tuple[LayerConfig, ...]) -> None:
        """Keep keys and values of a drafter's layers too, in the pages of the full ones: a window
        is no more than a mask to them. Evaluates.

        In pages that were there before, theirs are zero.

        Raises:
            ValueError: There are those of another drafter.
            RuntimeError: There is no room for them.
        """
        if not layers or layers == self.beside:
            return
        if self.beside:
            raise ValueError("[cache] an arena must serve the layers of one drafter but got two.")
        shapes = [(self.full.count, n.num_kv_heads, PAGE, n.head_dim) for n in layers]
        size = sum(2 * n.num_kv_heads * PAGE * n.head_dim for n in layers) * self._dtype.size
        if self.most_bytes is not None and self.nbytes + size * self.full.count > self.most_bytes:
            raise RuntimeError(
                f"[cache] pages must fit the {self.most_bytes / 1e9:.2f} GB of the arena but those "
                f"there are need {size * self.full.count / 1e9:.2f} GB more for a drafter."
            )
        keys, values = ([mx.zeros(shape, self._dtype) for shape in shapes] for _ in "kv")
        mx.eval(keys, values)
        self.keys, self.values = [*self.keys, *keys], [*self.values, *values]
        self.layers = (*self.config.layers, *layers)
        self._page_bytes[False] += size

    @property
    def is_growing(self) -> bool:
        """Whether somebody has broken off its growth."""
        return bool(self._growing)

    def new_cache(self) -> Cache:
        """A sequence without positions."""
        return Cache(self)

    def resume(self, length: int, full: Sequence[int], sliding: Mapping[int, int]) -> Cache:
        """A sequence that begins with the first ``length`` positions of pages that are held.

        It shares the whole ones and copies the one that it will write to. Evaluates.

        Args:
            length: Positions.
            full: Their pages.
            sliding: Those of the window before ``length``, by place in the sequence; perhaps more.

        Raises:
            RuntimeError: There is no room for the copy.
        """
        cache, whole = self.new_cache(), length // PAGE
        first = max(0, length - (self.window - 1)) // PAGE
        try:
            for page in full[:whole]:
                self.full.hold(page)
                cache.full.append(page)
            for j in sorted({*range(first, whole), *(j for j in sliding if j < whole)}):
                self.sliding.hold(sliding[j])
                cache.sliding[j] = sliding[j]
            if length % PAGE:
                self.make_room(1, 1)
                cache.full.append(self.full.take())
                cache.sliding[whole] = self.sliding.take()
                self.copy(False, full[whole : whole + 1], cache.full[-1:])
                self.copy(True, [sliding[whole]], [cache.sliding[whole]])
            cache.settle(length)
        except BaseException:
            cache.release()
            raise
        return cache

    def growth(self, full: int, sliding: int) -> int:
        """Bytes that :meth:`make_room` will add.

        Raises:
            RuntimeError: More than the arena may have.
        """
        wanted = ((False, full), (True, sliding))
        return sum(self._step(kind, count) * self.page_bytes(kind) for kind, count in wanted)

    def make_room(self, full: int, sliding: int) -> None:
        """Have so many pages free. Evaluates if it grows.

        Raises:
            RuntimeError: More than the arena may have.
        """
        for kind, wanted in ((False, full), (True, sliding)):
            step = self._step(kind, wanted)
            if step or kind in self._growing:
                self.grow(kind, self.pages(kind).count + step)

    def _step(self, sliding: bool, wanted: int) -> int:
        """Pages to grow by for so many to be free."""
        pages, size = self.pages(sliding), max(1, self.page_bytes(sliding))
        lacking = wanted - pages.free
        if lacking <= 0:
            return 0
        step = self._stride(sliding, pages.count)
        if self.most_bytes is not None:
            spare = (self.most_bytes - self.nbytes) // size
            if lacking > spare:
                raise RuntimeError(
                    f"[cache] pages must fit the {self.most_bytes / 1e9:.2f} GB of the arena but "
                    f"{lacking * size / 1e9:.2f} GB more are needed."
                )
            step = 0  # what one kind has to spare the other would lack
        return max(lacking, step)

    def _stride(self, sliding: bool, count: int) -> int:
        """Pages that it grows by from so many, if no more are asked for."""
        size, many = max(1, self.page_bytes(sliding)), self._sequences
        least = max(LEAST_PAGES, min(LEAST_PAGES * many, SMALL // size))
        step = min(max(least, count // 2), MOST_PAGES, max(1, STEP // size))
        if sliding:  # no more than the sequences may need
            most = window_pages(self.window, CHUNK) + (many - 1) * window_pages(self.window, 1)
            step = min(step, most - count)
        return max(0, step)

    def grow(self, sliding: bool, count: int) -> None:
        """Have so many pages in all, one array after the other. Evaluates."""
        self._growing.add(sliding)  # whoever breaks this off, the next one ends it
        count = max([count, *(a.shape[0] for a in self._of_kind(sliding))])
        for arrays in (self.keys, self.values):
            for i, a in enumerate(arrays):
                if a is not None and self.layers[i].sliding == sliding:
                    more = mx.zeros((count - a.shape[0], *a.shape[1:]), a.dtype)
                    arrays[i] = a = mx.concatenate([a, more]) if a.size else more
                    mx.eval(a)
        pages = self.pages(sliding)
        pages.add(count - pages.count)
        self._growing.discard(sliding)

    def spare(self, sliding: bool) -> int:
        """Pages that :meth:`trim` would give back: none unless they are more than the others."""
        pages = self.pages(sliding)
        held = pages.count - pages.free
        enough = held + self._stride(sliding, held) if held else 0
        return pages.count - enough if pages.count > TRIMMED * enough else 0

    def trim(self, sliding: bool) -> dict[int, int]:
        """Give the memory of spare pages back, one array after the other. Evaluates.

        Returns:
            By their old numbers, the new ones of the pages that are held. Whoever holds them must
            take these over; if it is broken off, nobody knows what is where (:meth:`clear`).
        """
        pages = self.pages(sliding)
        moved = pages.pack(pages.count - self.spare(sliding))
        self.pack(sliding, list(moved), pages.count)
        return moved

    def pack(self, sliding: bool, kept: Sequence[int], count: int) -> None:
        """Have ``count`` pages in every layer of the kind: those that are kept, then others.
        Evaluates."""
        mx.eval(self._reads)  # of what is about to lie elsewhere
        places = mx.array(list(kept), dtype=mx.int32)
        for arrays in (self.keys, self.values):
            for i, a in enumerate(arrays):
                if a is not None and self.layers[i].sliding == sliding:
                    more = mx.zeros((count - len(kept), *a.shape[1:]), a.dtype)
                    arrays[i] = a = mx.concatenate([mx.take(a, places, axis=0), more])
                    mx.eval(a)
        mx.clear_cache()  # where MLX keeps what was freed

    def rest(self) -> None:
        """Have nothing under way, so that any thread may go on with it. Evaluates."""
        mx.eval(self._reads, self.arrays)
        self._reads = []

    def clear(self) -> None:
        """Have no pages, whoever holds some. Evaluates."""
        self._growing.clear()
        for kind in (False, True):
            self.pages(kind).clear()
        for arrays in (self.keys, self.values):
            for i, a in enumerate(arrays):
                if a is not None:
                    arrays[i] = mx.zeros((0, *a.shape[1:]), a.dtype)
        mx.eval(self.arrays)

    def copy(self, sliding: bool, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages in every layer of the kind. Evaluates."""
        mx.eval(self._reads)  # what was read from the targets when they were another's
        pair = [mx.array(list(pages), dtype=mx.int32) for pages in (sources, targets)]
        for arrays in (self.keys, self.values):
            for i, a in enumerate(arrays):
                if a is not None and self.layers[i].sliding == sliding:
                    arrays[i] = ops.copy_pages(a, *pair)
        mx.eval(self.arrays)

    def content(self, sliding: bool, page: int, own: bool = False) -> bytes:
        """A page of every layer of the kind, or of the target's ``own`` ones, one behind the other.
        Evaluates."""
        parts = [a[page].view(mx.uint8) for a in self._of_kind(sliding, own)]
        mx.eval(parts)
        return b"".join(bytes(memoryview(part)) for part in parts)  # type: ignore[arg-type]

    def fill(self, sliding: bool, page: int, content: bytes) -> None:
        """Write what :meth:`content` gave, into a page that nobody reads. Evaluates."""
        mx.eval(self._reads)  # what was read from the page when it was another's
        begin, view = 0, memoryview(content)
        for a in self._of_kind(sliding):
            if begin == len(view):  # without a drafter's layers
                break
            nbytes = a.nbytes // a.shape[0]
            part = mx.array(view[begin : begin + nbytes]).view(a.dtype)  # type: ignore[arg-type]
            a[page] = part.reshape(a.shape[1:])
            begin += nbytes
        mx.eval(self.arrays)

    def _of_kind(self, sliding: bool, own: bool = False) -> list[mx.array]:
        """Keys and values of the layers of a kind; of the target's ``own`` ones alone."""
        layers = self.config.layers if own else self.layers
        both = [
            (self.keys[i], self.values[i]) for i, n in enumerate(layers) if n.sliding == sliding
        ]
        return [a for pair in both for a in pair if a is not None]

    def after_reads(self, x: mx.array) -> mx.array:
        """x, made to depend on every result noted by :meth:`note_read` so far."""
        reads, self._reads = self._reads, []
        return mx.depends([x], reads)[0] if reads else x

    def note_read(self, result: mx.array) -> None:
        """Note a result that depends on reading the arena; the next call's writes wait for it."""
        self._reads.append(result)

    def slots(self, i: int) -> tuple[mx.array, mx.array]:
        """Keys and values of layer i, to be written to and given back by :meth:`store`."""
        keys, values = self.keys[i], self.values[i]
        assert keys is not None and values is not None
        return keys, values

    def store(self, i: int, keys: mx.array, values: mx.array) -> None:
        """Keep what a write to the slots of layer i returned."""
        self.keys[i], self.values[i] = keys, values

    def keep_path(self, caches: Sequence[Cache], rows: mx.array, kept: mx.array) -> None:
        """Move keys and values of the rows that are kept of each sequence's tree, which stands
        behind its committed positions, to where plain steps would have written them: before these
        rows are committed. What is committed depends on that.

        Args:
            caches: The sequences.
            rows: Of each the path's rows, by depth, int32 ``[Q, A]``.
            kept: How many of them are kept, int32 ``[Q]``.
        """
        batch = self.batch(caches)
        for i, layer in enumerate(self.config.layers):
            if layer.kv_source == i:
                where = batch.lengths, batch.tables[layer.sliding], rows, kept
                self.store(i, *ops.move_rows(*self.slots(i), *where))
        moved = [self.keys[i] for i, n in enumerate(self.config.layers) if n.kv_source == i]
        for cache in caches:
            [cache.length] = mx.depends([cache.length], [a for a in moved if a is not None])

    def take_results(self, arrays: Sequence[mx.array]) -> None:
        """Go on with other arrays, in the order of ``arrays``; with these if there are none."""
        if arrays:
            rest = iter(arrays)
            self.keys = [None if a is None else next(rest) for a in self.keys]
            self.values = [None if a is None else next(rest) for a in self.values]

    def place(self, caches: Sequence[Cache]) -> Placed:
        """What a round of these sequences gets, whose lengths the host knows."""
        assert all(c.arena is self and c.committed == c.length_limit for c in caches)
        lengths = mx.array([cache.committed for cache in caches], dtype=mx.int32)
        full, sliding = (self._table(kind, caches, is_round=True) for kind in (False, True))
        return Placed(self.arrays, lengths, full, sliding, self.identity)

    def with_arrays(self, arrays: Sequence[mx.array]) -> Arena:
        """The same over other arrays, that nobody has read."""
        other = copy.copy(self)
        other.take_results(arrays)
        other._reads, other._tables = [], {}
        return other

    def with_placed(self, placed: Placed) -> Arena:
        """The same over the arrays of a round: what one is recorded on."""
        other = self.with_arrays(placed.arrays)
        other._identity = placed.identity
        other._batch = Batch(other, placed.lengths, {False: placed.full, True: placed.sliding})
        return other

    def batch(self, caches: Sequence[Cache]) -> Batch:
        """Sequences as one call takes them; what it writes they have pages for."""
        if self._batch is not None:
            return self._batch.part([cache.place for cache in caches])
        lengths = packed([cache.length.reshape(1) for cache in caches])
        tables = {kind: self._table(kind, caches, is_round=False) for kind in (False, True)}
        return Batch(self, lengths, tables)

    def _table(self, sliding: bool, caches: Sequence[Cache], is_round: bool) -> mx.array:
        """Pages of sequences, int32 ``[Q, N]``. Of a round N is a power of two, so that few graphs
        are recorded; of other calls it is near what is held, all of which MLX's kernels read."""
        N = max(LEAST_PAGES, *(cache.width(sliding) for cache in caches))
        N = 1 << (N - 1).bit_length() if is_round else -(-N // LEAST_PAGES) * LEAST_PAGES
        key = (N, *(cache.changed[sliding] for cache in caches))
        if sliding not in self._tables or self._tables[sliding][0] != key:
            rows = [cache.row(sliding, N) for cache in caches]
            self._tables[sliding] = key, mx.array(rows, dtype=mx.int32)
        return self._tables[sliding][1]

    def note_change(self) -> int:
        """A number for the pages that a sequence has now."""
        return next(self._changes)


class Cache:
    """One sequence's part of an arena.

    Attributes:
        arena: Where its keys and values are.
        length: Committed positions, int32 ``[]`` on the device.
        length_limit: A number that the host knows ``length`` not to exceed.
        committed: So many positions the host knows to be committed.
        full: Pages of the full layers; ``full[j]`` has positions ``64 j`` to ``64 j + 63``.
        sliding: Pages of the sliding layers, by j; those behind the window are given back.
        place: Its place in a recorded round.
        changed: By kind, a number that is another one whenever its pages are others.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.length = mx.array(0, dtype=mx.int32)
        self.length_limit = self.committed = 0
        self.full: list[int] = []
        self.sliding: dict[int, int] = {}
        self.place = -1
        self.changed = {sliding: arena.note_change() for sliding in (False, True)}

    @property
    def arrays(self) -> list[mx.array]:
        """Everything a caller has to evaluate to have the cache evaluated."""
        return [*self.arena.arrays, self.length]

    @property
    def nbytes(self) -> int:
        """Memory of its pages, whoever else holds them."""
        full, sliding = (self.arena.page_bytes(kind) for kind in (False, True))
        return len(self.full) * full + len(self.sliding) * sliding

    @property
    def state(self) -> list[mx.array]:
        """What a round changes, beside the arena's arrays."""
        return [self.length]

    def with_state(self, state: Sequence[mx.array], arena: Arena, place: int) -> Cache:
        """The same sequence in a recorded round, as that number ``place`` of ``arena``."""
        other = copy.copy(self)
        other.arena, other.place = arena, place
        [other.length] = state
        return other

    def take_results(self, state: Sequence[mx.array], length_limit: int) -> None:
        """Go on with what a round gave; its length is at most ``length_limit``."""
        [self.length] = state
        self.length_limit = length_limit

    def growth(self, count: int) -> int:
        """Bytes that :meth:`reserve` will add to the arena."""
        full, sliding = self._missing(count)
        return self.arena.growth(len(full), len(sliding)) if full or sliding else 0

    def reserve(self, count: int) -> None:
        """Have pages for ``count`` positions more; they are written next. Evaluates if the arena
        grows.

        Raises:
            RuntimeError: More than the arena may have.
        """
        if self.place >= 0:  # whoever plays a round has made room for it
            return
        full, sliding = self._missing(count)
        if not (full or sliding or self.arena.is_growing):
            return
        self.arena.make_room(len(full), len(sliding))
        for _ in full:
            self.full.append(self.arena.full.take())
        for j in sliding:
            self.sliding[j] = self.arena.sliding.take()
        self._note_changes(bool(full), bool(sliding))

    def _missing(self, count: int) -> tuple[range, list[int]]:
        """Places of pages that ``count`` positions more need, of each kind."""
        end = -(-(self.length_limit + count) // PAGE)
        first = max(0, self.committed - (self.arena.window - 1)) // PAGE
        return range(len(self.full), end), [j for j in range(first, end) if j not in self.sliding]

    def commit(self, count: mx.array, length_limit: int) -> None:
        """Keep ``count`` (int32 []) of the positions written last; the new length is at most
        ``length_limit``.

        Positions written and not committed are rolled back by this, at no cost.
        """
        self.length = self.length + count
        self.length_limit = length_limit

    def settle(self, length: int) -> None:
        """Note that exactly ``length`` positions are committed, no fewer than ever before; give
        back what lies behind the window of the last whole page, some positions back: a text may be
        taken up there, in this process or another."""
        self.length = mx.array(length, dtype=mx.int32)
        self.length_limit = self.committed = length
        behind = max(0, length - BACK) // PAGE * PAGE - (self.arena.window - 1)
        gone = [j for j in self.sliding if PAGE * (j + 1) <= behind]
        for j in gone:
            self.arena.sliding.drop(self.sliding.pop(j))
        self._note_changes(False, bool(gone))

    def can_fork(self, length: int) -> bool:
        """Whether the positions that the next ones attend to are there."""
        first = max(0, length - (self.arena.window - 1)) // PAGE
        return length <= self.length_limit and all(
            j in self.sliding for j in range(first, -(-length // PAGE))
        )

    def fork(self, length: int) -> Cache:
        """A sequence that begins with the first ``length`` positions of this one; neither will
        see what the other does. Shares all pages but the last. Evaluates.

        Raises:
            ValueError: Pages of the window before ``length`` were given back.
            RuntimeError: There is no room for a copy of the last page.
        """
        if not self.can_fork(length):
            raise ValueError(
                f"[cache] a fork's length must be at most {self.length_limit} and within the "
                f"window that is kept but got {length}."
            )
        return self.arena.resume(length, self.full, self.sliding)

    def release(self) -> None:
        """Give all pages back; it has no positions any more."""
        while self.full:
            self.arena.full.drop(self.full.pop())
        while self.sliding:
            self.arena.sliding.drop(self.sliding.popitem()[1])
        self._note_changes(True, True)
        self.length_limit = self.committed = 0

    def width(self, sliding: bool) -> int:
        """How many entries its row of a table needs."""
        if not sliding:
            return len(self.full)
        return 1 + max(self.sliding) - min(self.sliding) if self.sliding else 0

    def row(self, sliding: bool, N: int) -> list[int]:
        """Its row of a table with N entries: the page with place j is at ``j % N``."""
        row = [-1] * N
        for j, page in self.sliding.items() if sliding else enumerate(self.full):
            row[j % N] = page
        return row

    def _note_changes(self, full: bool, sliding: bool) -> None:
        if full:
            self.changed[False] = self.arena.note_change()
        if sliding:
            self.changed[True] = self.arena.note_change()


def window_pages(window: int, rows: int) -> int:
    """The most pages that a sequence has while ``rows`` positions are written: theirs, and what
    :meth:`Cache.settle` keeps before them."""
    return -(-(window - 1) // PAGE) + -(-(PAGE - 1 + BACK + rows) // PAGE)
