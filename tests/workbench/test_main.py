"""The command for kernel authors."""

import pytest
from snippets import PREAMBLE, source

from workbench.__main__ import main
from workbench.library import METAL
from workbench.strict import problems

SCALE = f"""{PREAMBLE}constant bool twice [[function_constant(0)]];
kernel void scale(const device float* a [[buffer(0)]], device bfloat* o [[buffer(1)]],
    constant float& by [[buffer(2)]], threadgroup float* t [[threadgroup(0)]],
    uint i [[thread_position_in_grid]], uint l [[thread_index_in_threadgroup]]) {{
  t[l] = a[i] * by * (twice ? 2 : 1);
  o[i] = bfloat(t[l]);
}}
"""
BUFFERS = ["a:in:float32:4x16", "o:out:bfloat16:4x16", "by:float32=1.5"]
ABOUT = ["--grid", "2", "--threadgroup", "32", "--constants", "0=true", "--memory", "0=128"]


def test_a_kernel_is_run_and_counted(capsys):
    assert main([source(SCALE), "scale", "--shapes", *BUFFERS, *ABOUT, "--mode", "count"]) == 0
    said = capsys.readouterr().out
    assert "threadgroup memory 128 bytes, 0 findings" in said
    assert "a                     256          256            0       1.00" in said
    assert ".metal:7: 2 simd reads of a, 2.00 lines each" in said


def test_faults_are_listed_and_end_with_1(capsys):
    short = ["a:in:float32:4x15", *BUFFERS[1:]]
    assert main([source(SCALE), "scale", "--shapes", *short, *ABOUT]) == 1
    said = capsys.readouterr().out
    assert "out-of-bounds: read of 4 bytes, the buffer has 240 at `a` + 240" in said
    assert "threadgroup (1, 0, 0), thread 28" in said


def test_a_file_without_a_kernel_lists_them(capsys):
    assert main([source(SCALE)]) == 0
    assert capsys.readouterr().out == "scale\nfunction constant 0: twice\n"


def test_mistakes_end_with_2(capsys):
    assert main([source(SCALE), "scale", "--shapes", "a:in:float32"]) == 2
    assert "buffer must be NAME:ROLE:DTYPE:SHAPE but got a:in:float32." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SCALE, None),
        (SCALE.replace("o[i] =", "uint unused = l; o[i] ="), "unused variable 'unused'"),
        (
            SCALE.replace("o[i] =", "int x = a[i]; o[x == i] ="),
            "comparison of integers",
        ),
        (SCALE.replace("a[i] * by", "a[i] * nothing"), "undeclared identifier 'nothing'"),
        (SCALE + "// caf\N{LATIN SMALL LETTER E WITH ACUTE}", ":10: the text must be ASCII"),
        (SCALE.replace("bfloat(t[l])", "double(t[l])"), "Metal has no `double`"),
    ],
)
def test_strict_compilation(capsys, text, complaint):
    assert main(["--strict", source(text)]) == (0 if complaint is None else 1)
    said = capsys.readouterr().out
    assert (complaint or "1 files compile without a warning") in said


@pytest.mark.parametrize("path", sorted(METAL.glob("*.metal")), ids=lambda path: path.stem)
def test_every_kernel_of_ours_compiles_strictly(path):
    assert problems(path) == ""
