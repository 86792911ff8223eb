"""Whether a launcher started this process as one of several. Imports next to nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping

# What MLX's own launcher sets for each backend that it starts; read by `mx.distributed.init` too
STARTED = {"ring": ("MLX_RANK", "MLX_HOSTFILE"), "jaccl": ("MLX_RANK", "MLX_IBV_DEVICES")}
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"


def backend(environ: Mapping[str, str] = os.environ) -> str | None:
    """Which of MLX's backends connects the group; None for a process of its own."""
    for name, variables in STARTED.items():
        if all(variable in environ for variable in variables):
            return name
    return "mpi" if environ.get(OPEN_MPI, "1") != "1" else None


def is_started(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several."""
    return backend(environ) is not None


def follows(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether it was started as another than the first."""
    own = environ.get("MLX_RANK", environ.get("OMPI_COMM_WORLD_RANK", "0"))
    return is_started(environ) and own != "0"
