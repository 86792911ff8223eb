"""How a token is chosen: the settings of it."""

from pyengine.sampling.settings import Sampling

__all__ = ["Sampling"]
