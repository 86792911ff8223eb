"""Grammars of answers: JSON, JSON schemas, regular expressions, Lark grammars, calls of tools.

What is asked for is read here (:mod:`.asked`), compiled with llguidance for one vocabulary
(:mod:`.compiled`), and followed through one text (:mod:`.matcher`). The library is an extra:
``pip install "pyengine-mlx[grammar]"``.
"""

from pyengine.grammar.asked import Source, read_response_format, source_of
from pyengine.grammar.compiled import Grammar, compile_grammar
from pyengine.grammar.matcher import GrammarMatcher

__all__ = [
    "Grammar",
    "GrammarMatcher",
    "Source",
    "compile_grammar",
    "read_response_format",
    "source_of",
]
