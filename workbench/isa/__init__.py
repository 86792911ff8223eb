"""Kernels compiled for a GPU of stock LLVM, and counts of what they execute there.

See `python -m workbench isa --help`, and `rows.Row` for what the numbers are.
"""
