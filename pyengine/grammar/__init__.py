"""Grammars of answers: JSON, JSON schemas, regular expressions, Lark grammars, calls of tools.

What is asked for is read in :mod:`pyengine.grammar.asked`, calls are written as a grammar in
:mod:`pyengine.grammar.tools`. With llguidance a grammar is compiled for one vocabulary
(:mod:`pyengine.grammar.compiled`) and followed through one text (:mod:`pyengine.grammar.matcher`).
The library is an extra: ``pip install "pyengine-mlx[grammar]"``.
"""
