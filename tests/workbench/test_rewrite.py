"""Metal to C++, token by token."""

import pytest

from workbench.entry import entry_point
from workbench.rewrite import rewrite
from workbench.tokens import Tokens


def body(line):
    """What a line inside a function becomes, without blanks."""
    before, after = "void f() {\n", "\n}"
    text = rewrite(before + line + after, {}).text
    assert text.startswith(before) and text.endswith(after)
    return text[len(before) : -len(after)].replace(" ", "")


@pytest.mark.parametrize(
    ("metal", "cpp"),
    [
        ("x = float4(a, b);", "x=msl_make<float4>(a,b);"),
        ("x = vec<T, 4>(a, b);", "x=msl_make<vec<T,4>>(a,b);"),
        ("short2 at(a, b);", "short2at=msl_make<short2>(a,b);"),
        ("x = (float4)y;", "x=metal::msl_to<float4>()->*y;"),
        ("x = static_cast<float4>(y);", "x=msl_make<float4>(y);"),
        ("x = static_cast<T>(y);", "x=msl_cast<T>(y);"),
        ("x = 1.5h + 2h + 0x1h;", "x=((half)1.5f)+((half)2)+0x1h;"),
        ("x = 0.1bf;", "x=((bfloat)0.1f);"),
        (
            "*((device V*)to) = *((threadgroup V*)from);",
            "msl_store(((deviceV*)to),msl_load((threadgroupV*)from));",
        ),
        ("V v = *((const device V*)from);", "Vv=msl_load((constdeviceV*)from);"),
        ("float4 f();", "float4f();"),
        ("if (a < float4::size && b > c) g(a);", "if(a<float4::size&&b>c)g(a);"),
        ("threadgroup float* p = t;", "threadgroupfloat*p=t;"),
    ],
)
def test_expressions(metal, cpp):
    assert body(metal) == cpp


def test_what_needs_no_rewriting_is_left_alone():
    text = "void f(device float* x) {\n  // white space   stays\n  x[0] += a < b ? 1 : 2;\n}\n"
    assert rewrite(text, {}).text == text


def test_line_numbers_survive():
    text = '# 7 "k.metal"\nkernel void k(\n  device float* o [[buffer(0)]]) {\n'
    text += " threadgroup\n float t;\n}"
    unit = rewrite(text, {})
    assert unit.text.count("\n") == text.count("\n")
    tokens = Tokens(text)
    assert tokens.where(next(p for p in tokens if tokens.text[p] == "t")) == "k.metal:10"


def test_threadgroup_variables_become_what_the_library_has_for_them():
    line = body("threadgroup T t[2][N + 1], s;")
    assert "usingmsl_type_t=T[2][N+1];" in line
    assert "usingmsl_type_s=T;" in line
    assert line.count("MSL_THREADGROUP_VARIABLE(") == 2
    assert "alignas" not in body("alignas(16) threadgroup T t[2];")


def test_function_constants_get_their_values():
    text = "constant bool b [[function_constant(4)]];\nconstant float x [[function_constant(0x5)]];"
    unit = rewrite(text, {4: True})
    assert unit.constants == {"b": 4, "x": 5}
    assert "not_constexpr<bool>((bool)true)" in unit.text
    assert "msl_missing_5_x" in unit.text
    assert "msl_is_defined_b = true" in unit.text and "msl_is_defined_x = false" in unit.text


def test_member_functions_in_other_address_spaces_go():
    text = "struct C { float x; C(float a) : x(a) {} float f() thread { return x; }\n"
    text += "float f() const device { return x; } C(float a) constant : x(a) {} };"
    code = " ".join(rewrite(text, {}).text.split())
    assert code == "struct C { float x; C(float a) : x(a) {} float f() { return x; } };"


def test_array_parameters_become_pointers():
    text = rewrite("void f(constant const int s[3], constant int& n) {}", {}).text
    assert " ".join(text.split()) == "void f(constant const int * s, constant int& n) {}"


KERNELS = """
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(N * 32)]] void many(
    const device T* a, device T* b [[buffer(0)]], constant int& n,
    device T* c [[buffer(3), function_constant(with_c)]], threadgroup float* t [[threadgroup(1)]],
    uint3 g [[threadgroup_position_in_grid]]) {}
template [[host_name("many_" "float")]] [[kernel]] decltype(many<float, 4>) many<float, 4>;
template [[host_name("many_half")]] kernel void many<half, 4>(const device half*, device half*);
kernel void plain(device float* o [[buffer(0)]]) {}
"""


def test_kernels_and_their_parameters():
    unit = rewrite(KERNELS, {})
    assert unit.hosts == {"many_float": "many < float , 4 >", "many_half": "many < half , 4 >"}
    assert set(unit.kernels) == {"many", "plain"} and unit.templates == {"many"}
    assert "[[" not in unit.text and "host_name" not in unit.text
    entry = entry_point(unit, "many_float")
    # Parameters without an index take the lowest that are free.
    assert entry.buffers == {0: "b", 1: "a", 2: "n", 3: "c"}
    assert entry.optional == [3] and entry.threadgroup == {1: "t"}
    assert entry_point(unit, "many<int, 2>").buffers == entry.buffers
    assert entry_point(unit, "plain").buffers == {0: "o"}
    with pytest.raises(ValueError, match=r"must be one of many_float, many_half, plain but got m"):
        entry_point(unit, "many")


def test_parameters_that_are_neither_memory_nor_built_in_are_refused():
    unit = rewrite("kernel void k(device int* o [[buffer(0)]], float4 p [[stage_in]]) {}", {})
    with pytest.raises(ValueError, match=r"`float4 p` must be a buffer or a built-in value"):
        entry_point(unit, "k")


def test_what_is_no_metal():
    unit = rewrite('# 1 "k.metal"\nvoid f() {\n  double x;\n  auto p = new int;\n}', {})
    assert unit.mistakes == ["k.metal:2: Metal has no `double`", "k.metal:3: Metal has no `new`"]


def test_unbalanced_brackets_are_named():
    with pytest.raises(SyntaxError, match=r"k\.metal:1: `\(` is never closed"):
        rewrite('# 1 "k.metal"\nkernel void f(int x {}', {})
