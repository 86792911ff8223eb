"""The Metal workbench: compiles .metal files for the processor, runs them, checks and counts.

Development only; run from a checkout. README.md beside this file says what it can and cannot do.
"""

from .launch import Buffer, Launch
from .report import KINDS, Fault, Finding, Report, Site, Traffic
from .run import run
from .toolchain import CompileError

__all__ = [
    "KINDS",
    "Buffer",
    "CompileError",
    "Fault",
    "Finding",
    "Launch",
    "Report",
    "Site",
    "Traffic",
    "run",
]
