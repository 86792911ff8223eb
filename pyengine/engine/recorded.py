"""Functions of arrays whose graph is built once and played again: what a round costs the host."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from pyengine import _ext
from pyengine.ops.dispatch import lazy

ArrayFunction = Callable[[Sequence[mx.array]], Sequence[mx.array]]


def recorded(function: ArrayFunction) -> ArrayFunction:
    """``function``, run once for a set of shapes and dtypes; after that its graph is played.

    The graph is the very one that the function builds, node for node, so no bit differs;
    ``mx.compile`` would fuse nodes. On a processor it is one node to MLX, which has more to do for
    a node than most of ours take. The function must read nothing that changes but its arguments:
    what depends on no argument is computed once. On another thread it is run again, for nodes
    belong to the stream they were made on. The four graphs used last are kept. Under
    ``ops.use("workbench")``, where ops evaluate, the function itself is returned.
    """
    return _ext.Recorded(function) if lazy() else function
