"""Keys and values of one generation: append, commit, rollback.

Full layers are linear and grow in steps. Sliding layers are rings of ``window - 1 + max_block``
slots: a block may be written and any tail of it refused without losing a key that a later position
needs, so rollback is only a length that did not move. Position p of a ring lies in slot ``p % C``.

Writes happen in place (:func:`pyengine.ops.write_cache`), which is safe under three rules kept
here: the returned handle is the only one; every write depends on the calls that read the cache
before it (:meth:`Cache.note_read`, :meth:`Cache.after_reads`); readers mask by ``length``, so what
lies beyond it is nothing. On a GPU the second rule orders the commands, and ``block_attention``
tells MLX's encoder that what it reads is in use, so that a later write waits for it.
"""

from collections.abc import Sequence

import mlx.core as mx

from pyengine import ops
from pyengine.model.config import TargetConfig

CAPACITY_STEP = 512


class Cache:
    """Keys and values ``[1, K, C, D]`` of the layers that have their own, for one generation.

    ``length`` is the number of committed positions, on the device; ``length_limit`` is a number
    that the host knows it not to exceed. No position from ``written`` on was ever written to, so
    that the rings hold all from ``kept_from`` on. Lists are indexed by layer and hold None where a
    layer shares.
    """

    def __init__(self, config: TargetConfig, max_block: int, dtype: mx.Dtype) -> None:
        if max_block < 1:
            raise ValueError(f"[cache] max_block must be at least 1 but got {max_block}.")
        self.config = config
        self.max_block = max_block
        self.window = config.window
        self.length = mx.array(0, dtype=mx.int32)
        self.length_limit = 0
        self.written = 0
        self.keys: list[mx.array | None] = []
        self.values: list[mx.array | None] = []
        self._reads: list[mx.array] = []
        self._newest: tuple[mx.array, mx.array] | None = None
        for i, layer in enumerate(config.layers):
            slots = config.window - 1 + max_block if layer.sliding else CAPACITY_STEP
            shape = (1, layer.num_kv_heads, slots, layer.head_dim)
            own = layer.kv_source == i
            self.keys.append(mx.zeros(shape, dtype) if own else None)
            self.values.append(mx.zeros(shape, dtype) if own else None)
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Everything a caller has to evaluate to have the cache evaluated."""
        return [a for a in [*self.keys, *self.values, self.length] if a is not None]

    def with_arrays(self, arrays: Sequence[mx.array]) -> "Cache":
        """The same cache over other arrays, in the order of ``arrays``: what a round is recorded
        on."""
        copy = object.__new__(Cache)
        copy.__dict__.update(self.__dict__)
        *stored, copy.length = arrays
        rest = iter(stored)
        copy.keys = [None if a is None else next(rest) for a in self.keys]
        copy.values = [None if a is None else next(rest) for a in self.values]
        copy._reads = []
        return copy

    def take_results(self, arrays: Sequence[mx.array], length_limit: int) -> None:
        """Go on with what a recorded round gave: all arrays, or the length alone where it wrote to
        those that are here. Its length is at most ``length_limit``."""
        stored = self.arrays[: -len(arrays)]
        self.__dict__.update(
            self.with_arrays([*stored, *arrays]).__dict__, length_limit=length_limit
        )

    def reserve(self, count: int) -> None:
        """Make room in linear layers for ``count`` positions more; they are written next."""
        self.written = max(self.written, self.length_limit + count)
        slots = _round_up(self.length_limit + count, CAPACITY_STEP)
        for arrays in (self.keys, self.values):
            for i, a in enumerate(arrays):
                if a is not None and not self.config.layers[i].sliding and a.shape[2] < slots:
                    arrays[i] = _grown(a, slots - a.shape[2])

    def growth(self, count: int) -> int:
        """Bytes that :meth:`reserve` will add to the cache."""
        slots = _round_up(self.length_limit + count, CAPACITY_STEP)
        return sum(
            a.nbytes // a.shape[2] * (slots - a.shape[2])
            for arrays in (self.keys, self.values)
            for a, layer in zip(arrays, self.config.layers, strict=True)
            if a is not None and not layer.sliding and a.shape[2] < slots
        )

    @property
    def newest(self) -> mx.array:
        """Position of the newest committed key, int32 []; made once for a length."""
        if self._newest is None or self._newest[0] is not self.length:
            self._newest = self.length, self.length - 1
        return self._newest[1]

    @property
    def kept_from(self) -> int:
        """The first position that no ring has overwritten."""
        return max(0, self.written - (self.window - 1 + self.max_block))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def commit(self, count: mx.array, length_limit: int) -> None:
        """Keep ``count`` (int32 []) of the positions written last; the new length is at most
        ``length_limit``.

        Positions written and not committed are rolled back by this, at no cost.
        """
        self.length = self.length + count
        self.length_limit = length_limit

    def after_reads(self, x: mx.array) -> mx.array:
        """x, made to depend on every result noted by :meth:`note_read` so far."""
        reads, self._reads = self._reads, []
        return mx.depends([x], reads)[0] if reads else x

    def note_read(self, result: mx.array) -> None:
        """Note a result that depends on reading the cache; the next call's writes wait for it."""
        self._reads.append(result)

    def slots(self, i: int) -> tuple[mx.array, mx.array]:
        """Keys and values of layer i, to be written to and given back by :meth:`store`."""
        keys, values = self.keys[i], self.values[i]
        assert keys is not None and values is not None
        return keys, values

    def store(self, i: int, keys: mx.array, values: mx.array) -> None:
        """Keep what a write to the slots of layer i returned."""
        self.keys[i], self.values[i] = keys, values

    def is_prefill_chunk(self, i: int, T: int) -> bool:
        """Whether T new positions are more than a block: in a ring they would push out keys that
        they attend to."""
        return self.config.layers[i].sliding and self.max_block < T

    def append_chunk(
        self, i: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Write a prefill chunk [1, T, K, D] that overflows the ring: attend a copy, keep the
        newest keys.

        Returns what the chunk attends to: keys and values, the ``window - 1`` before the chunk and
        then its own, and the position of the first. Commits nothing.
        """
        ring_keys, ring_values = self.slots(i)
        T, slots = keys.shape[1], ring_keys.shape[2]
        start = self.length - (self.window - 1)  # negative near the beginning; masked there
        newest = (start + mx.arange(self.window - 1, dtype=mx.int32)) % slots
        seen = [
            mx.concatenate([mx.take(ring, newest, axis=2), new.swapaxes(1, 2)], axis=2)
            for ring, new in ((ring_keys, keys), (ring_values, values))
        ]
        # Out of what was read, so that the write cannot overtake the reads: not on a GPU either,
        # where mx.depends orders the commands but not buffers that no command shares
        kept = min(T, slots)
        tail_keys, tail_values = (a[:, :, -kept:].swapaxes(1, 2) for a in seen)
        offset = self.length + (T - kept)
        self.keys[i] = ops.write_cache(ring_keys, tail_keys, offset)
        self.values[i] = ops.write_cache(ring_values, tail_values, offset)
        return seen[0], seen[1], start

    def restart(self, length: int) -> None:
        """Go on from ``length`` positions, which must be committed and in the rings. Evaluates."""
        self.length = mx.array(length, dtype=mx.int32)
        self.length_limit = length
        self._reads = []
        mx.eval(self.arrays)

    def snapshot(self) -> "Cache":
        """An independent copy of the committed state; copies every array."""
        copy = object.__new__(Cache)
        copy.__dict__.update(self.__dict__)
        # A product by one is a new buffer; a plain handle would see later writes
        copy.keys = [None if a is None else a * 1 for a in self.keys]
        copy.values = [None if a is None else a * 1 for a in self.values]
        copy._reads = []
        mx.eval(copy.arrays)
        return copy


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _grown(a: mx.array, slots: int) -> mx.array:
    """The linear cache a with zeroed slots behind it."""
    B, K, _, D = a.shape
    return mx.concatenate([a, mx.zeros((B, K, slots, D), a.dtype)], axis=2)
