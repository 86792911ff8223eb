"""Metal to C++: the few places where the two languages write things differently.

No meaning is decided here; types, overloads and address spaces are left to the compiler and to
include/msl. What is rewritten, token by token:

* kernels: their attributes are read and removed; entry.py writes the functions that call them, in
  the namespace of each;
* explicit instantiations with a host name are read and removed;
* `threadgroup T x[N];` inside a function becomes MSL_THREADGROUP_VARIABLE(x) of include/msl;
* function constants get the launch's values;
* vector constructors and casts, half and bfloat literals;
* `constant` variables, array parameters in an address space, copies of whole objects between
  address spaces, and member functions qualified with an address space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .tokens import Tokens

_INTEGERS = ("char", "uchar", "short", "ushort", "int", "uint", "long", "ulong")
_SCALARS = (*_INTEGERS, "half", "float", "bfloat", "bool")
_VECTORS = {f"{scalar}{n}" for scalar in _SCALARS for n in (2, 3, 4)}
_FLOAT16 = {"half", "float16_t", "bfloat", "bfloat16_t"}
_SPACES = {"device", "constant", "threadgroup", "thread"}
_NOT_METAL = {
    *("double", "goto", "new", "delete", "virtual", "dynamic_cast", "typeid"),
    *("try", "catch", "throw", "thread_local"),
}
_ATTRIBUTES = {
    *("buffer", "threadgroup", "function_constant", "kernel", "host_name"),
    *("max_total_threads_per_threadgroup", "visible", "id", "texture", "sampler"),
}
_SPECIFIERS = {"static", "constexpr", "const", "inline"}
_NOT_A_TYPE = {"operator", "struct", "using", "typename", ".", "->", "~"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: its name, its attributes, and its text without them."""

    name: str
    attributes: dict[str, str]
    text: str

    @property
    def is_memory(self) -> bool:
        """Whether it points to or refers to memory."""
        return any(mark in self.text for mark in "*&[")


@dataclass
class Unit:
    """What a rewritten source holds."""

    text: str = ""
    kernels: dict[str, list[Parameter]] = field(default_factory=dict)
    templates: set[str] = field(default_factory=set)  # kernels that are templates
    hosts: dict[str, str] = field(default_factory=dict)  # host name -> what it instantiates
    namespaces: dict[str, str] = field(default_factory=dict)  # kernel -> where it is, if anywhere
    threads: dict[str, int] = field(default_factory=dict)  # kernel -> most of a threadgroup
    constants: dict[str, int] = field(default_factory=dict)  # function constant -> index
    mistakes: list[str] = field(default_factory=list)  # C++ that is no Metal


def rewrite(source: str, constants: Mapping[int, bool | int | float]) -> Unit:
    """Rewrite preprocessed Metal source, with these values of its function constants."""
    return _Rewriter(source, constants).run()


class _Rewriter:
    def __init__(self, source: str, constants: Mapping[int, bool | int | float]) -> None:
        self.tokens = Tokens(source)
        self.constants = constants
        self.unit = Unit()
        self.vectors = set(_VECTORS)  # names of vector types, aliases included
        self.braces: list[str] = []  # those around a place, as `namespace` names them

    def run(self) -> Unit:
        self.read_declarations()
        self.set_function_constants()
        self.rewrite_bodies()
        self.unit.text = self.tokens.join()
        return self.unit

    # Declarations

    def read_declarations(self) -> None:
        t = self.tokens
        for p in t:
            word = t.text[p]
            if word == "{":
                self.braces.append(self.namespace(p))
            elif word == "}" and self.braces:
                self.braces.pop()
            elif word == "template" and t.text[p + 1] == "[" and t.text[p + 2] == "[":
                self.read_instantiation(p)
            elif word == "kernel":
                self.read_kernel(p)
            elif word in ("using", "typedef"):
                self.read_alias(p)

    def namespace(self, p: int) -> str:
        """a::b of the brace in `namespace a::b {`; of any other brace nothing."""
        t = self.tokens
        begin = p
        while t.kind[begin - 1] == "word" or t.text[begin - 1] == "::":
            begin -= 1
        words = t.words(begin, p).split()
        return "".join(words[1:]) if words[:1] == ["namespace"] else ""

    def read_alias(self, p: int) -> None:
        t = self.tokens
        end = p
        while t.text[end] not in (";", ""):
            end += 1
        body = t.words(p, end).replace("metal :: ", "")
        match = re.match(r"using (?P<name>\w+) = (?P<type>vec <.*>|\w+)$", body)
        match = match or re.match(r"typedef (?P<type>vec <.*>|\w+) (?P<name>\w+)$", body)
        if match and (match["type"] in self.vectors or match["type"].startswith("vec <")):
            self.vectors.add(match["name"])

    def read_instantiation(self, p: int) -> None:
        """template [[host_name("x")]] [[kernel]] decltype(f<..>) f<..>;  or  void f<..>(..);"""
        t = self.tokens
        end = p
        while t.text[end] != ";":
            end = t.close(end) if t.text[end] == "(" else end
            end += 1
        host = "".join(re.findall(r'"([^"]*)"', t.attributes(p, end, remove=False)["host_name"]))
        q = p + 1
        while t.text[q] == "[":
            q = t.close(q) + 1
        q += t.text[q] == "kernel"
        if t.text[q] == "decltype":
            self.unit.hosts[host] = t.words(t.close(q + 1) + 1, end)
        else:
            arguments = q
            while t.text[arguments] != "(":
                if t.text[arguments] == "<":
                    arguments = t.close_angle(arguments)
                arguments += 1
            name = arguments - 1
            if t.text[name] == ">":
                name = t.open_angle(name) - 1
            self.unit.hosts[host] = t.words(name, arguments)
        t.blank(p, end + 1)

    def read_kernel(self, p: int) -> None:
        """kernel void f(..) or [[kernel]] [[..]] void f(..), perhaps after template <..>."""
        t = self.tokens
        begin = p
        while t.text[begin - 1] == "[" and t.text[begin] != ";":
            begin -= 1
        q = t.close(begin) + 1 if t.text[begin] == "[" else p + 1
        first_attribute_end = q
        while t.text[q] == "[":
            q = t.close(q) + 1
        if t.text[q] != "void":
            return
        before = begin - 1
        while t.text[before] == "]" or t.text[before] in ("static", "inline"):
            before = (t.open(before) if t.text[before] == "]" else before) - 1
        opening = q
        while t.text[opening] != "(":
            opening += 1
        name = t.text[opening - 1]
        if t.text[before] == ">" and t.text[t.open_angle(before) - 1] == "template":
            self.unit.templates.add(name)
        parameters = []
        for a, b in t.split(opening + 1, t.close(opening)):
            attributes = t.attributes(a, b, remove=True)
            words = [word for word in t.text[a:b] if word]
            last = words.index("[") - 1 if "[" in words else -1
            parameter = Parameter(words[last], attributes, " ".join(words))
            if parameter.is_memory and not _SPACES & set(words):
                self.mistake(a, f"kernel parameter `{parameter.text}` must have an address space")
            parameters.append(parameter)
        first = begin
        while t.text[first - 1] == "]":  # [[host_name("x")]] [[kernel]]
            first = t.open(first - 1)
        attributes = t.attributes(first, q, remove=False)
        most = attributes.get("max_total_threads_per_threadgroup", "")
        if most.isdigit():  # an expression of template parameters is not looked at
            self.unit.threads[name] = int(most)
        if "host_name" in attributes:
            self.unit.hosts["".join(re.findall(r'"([^"]*)"', attributes["host_name"]))] = name
        t.blank(begin, first_attribute_end if t.text[begin] == "[" else p + 1)
        self.unit.kernels[name] = parameters
        self.unit.namespaces[name] = "::".join(filter(None, self.braces))

    def set_function_constants(self) -> None:
        """constant T name [[function_constant(n)]];"""
        t = self.tokens
        for p in t:
            if t.text[p] != "function_constant" or t.text[p - 2] != "[":
                continue
            end = t.close(p - 2)
            if t.text[end + 1] != ";":
                continue
            begin = p - 2
            while t.text[begin - 1] not in (";", "}", "{", ""):
                begin -= 1
            name = t.text[p - 3]
            kind = " ".join(
                w for w in t.text[begin : p - 3] if w not in _SPECIFIERS and w != "constant"
            )
            index = int(t.words(p + 2, t.close(p + 1)), 0)
            self.unit.constants[name] = index
            value = self.constants.get(index)
            if value is None:
                # Used after all, it is missed when the object is loaded.
                declared = f'extern "C" {kind} msl_missing_{index}_{name}; '
                declared += f"static {kind} const& {name} = msl_missing_{index}_{name}"
            else:
                literal = str(value).lower() if isinstance(value, bool) else repr(value)
                declared = f"static constant {kind} {name} = "
                declared += f"msl_entry::not_constexpr<{kind}>(({kind}){literal})"
            defined = str(value is not None).lower()
            t.blank(begin, end + 1)
            asked = f"[[maybe_unused]] static constant bool msl_is_defined_{name} = {defined}"
            t.text[begin] = f"{declared}; {asked}"

    # Bodies

    def rewrite_bodies(self) -> None:
        t = self.tokens
        depth = 0
        for p in t:
            word, kind = t.text[p], t.kind[p]
            if word in ("{", "}"):
                depth += 1 if word == "{" else -1
            elif kind == "number":
                self.literal(p)
            elif word == "[" and t.text[p + 1] == "[":
                self.drop_attribute(p)
            elif word == "*" and t.text[p + 1] == "(" and depth > 0:
                self.whole_copy(p)
            elif kind == "word":
                self.word(p, word, depth)

    def word(self, p: int, word: str, depth: int) -> None:
        t = self.tokens
        deleted = word == "delete" and t.text[p - 1] == "="
        if word in _NOT_METAL and not deleted and t.text[p - 1] not in ("operator", ".", "->"):
            self.mistake(p, f"Metal has no `{word}`")
        elif word == "static_cast" and t.text[p + 1] == "<":
            self.static_cast(p)
        elif word in ("bfloat", "bfloat16_t") and t.text[p + 1] == "(" and t.text[p + 2] != ")":
            if t.text[p - 1] != "operator":
                t.text[p] = f"msl_cast<{word}>"
        elif word in self.vectors:
            self.vector(p, word, depth)
        elif word == "vec" and t.text[p + 1] == "<" and t.text[p - 1] not in _NOT_A_TYPE:
            self.vector_template(p, depth)
        elif word == "coherent":
            t.blank(p, (t.close(p + 1) if t.text[p + 1] == "(" else p) + 1)
        elif word == "half" and t.text[p - 1] == "::" and t.text[p - 2] == "metal":
            t.blank(p - 2, p)
        elif word in _SPACES:
            self.address_space(p, word, depth)

    def literal(self, p: int) -> None:
        """1.5h and 1.5bf"""
        number = self.tokens.text[p]
        if number.startswith("0x"):
            return
        if number.endswith("bf"):
            digits, kind = number[:-2], "bfloat"
        elif number[-1] in "hH":
            digits, kind = number[:-1], "half"
        else:
            return
        suffix = "f" if re.search(r"[.eE]", digits) else ""
        self.tokens.text[p] = f"(({kind}){digits}{suffix})"

    def drop_attribute(self, p: int) -> None:
        t = self.tokens
        end = t.close(p)
        if any(t.text[q] in _ATTRIBUTES for q in range(p, end)):
            t.blank(p, end + 1)

    def static_cast(self, p: int) -> None:
        """To a vector, or between half and bfloat, perhaps under a template's name."""
        t = self.tokens
        end = t.close_angle(p + 1)
        if end < 0:
            return
        target = p + 4 if t.text[p + 2] == "metal" else p + 2
        whole = end == target + 1
        if (whole and t.text[target] in self.vectors) or (
            t.text[target] == "vec" and t.text[end - 1] == ">"
        ):
            t.text[p] = "msl_make"
        elif whole and (t.text[target] in _FLOAT16 or t.text[target][:1].isupper()):
            t.text[p] = "msl_cast"

    def vector(self, p: int, word: str, depth: int) -> None:
        """float4(a, b)   float4 x(a, b);   (float4)x"""
        t = self.tokens
        if depth > 0 and t.kind[p + 1] == "word" and t.text[p + 2] == "(":
            self.vector_declaration(p, p + 1, word)
        elif t.text[p - 1] == "(" and t.text[p + 1] == ")":
            is_call = t.kind[p - 2] == "word" and t.text[p - 2] != "return"
            is_operand = t.kind[p + 2] in ("word", "number") or t.text[p + 2] == "("
            if is_operand and not is_call and t.text[p - 2] not in (")", "]", ">"):
                t.text[p - 1], t.text[p], t.text[p + 1] = "", f"metal::msl_to<{word}>", "()->*"
        elif (
            t.text[p + 1] == "("
            and t.text[p + 2] not in ("&", "*")
            and t.text[p - 1] not in _NOT_A_TYPE | _SPACES
        ):
            t.text[p] = f"msl_make<{word}>"

    def vector_template(self, p: int, depth: int) -> None:
        """vec<T, 4>(a, b)   vec<T, 4> x(a, b);"""
        t = self.tokens
        end = t.close_angle(p + 1)
        if end < 0:
            return
        if depth > 0 and t.kind[end + 1] == "word" and t.text[end + 2] == "(":
            self.vector_declaration(p, end + 1, t.words(p, end + 1))
        elif t.text[end + 1] == "(" and t.text[p - 1] != "<":
            t.text[p] = "msl_make<vec"
            t.text[end] = "> >"

    def vector_declaration(self, p: int, name: int, kind: str) -> None:
        t = self.tokens
        end = t.close(name + 1)
        several = len(t.split(name + 2, end)) > 1
        if (
            several
            and t.text[end + 1] in (";", ",")
            and t.text[p - 1] not in ("operator", "return")
        ):
            t.text[name] += f" = msl_make<{kind}>"

    # Address spaces

    def address_space(self, p: int, word: str, depth: int) -> None:
        t = self.tokens
        if self.member_function(p):
            return
        previous = t.text[p - 1]
        after_alignas = previous == ")" and t.text[t.open(p - 1) - 1] == "alignas"
        if word == "threadgroup" and depth > 0 and (previous in ";{}:" or after_alignas):
            self.threadgroup_variable(p, after_alignas)
        if t.text[p] == word:
            self.array_parameter(p)
            if word == "constant":
                self.constant_variable(p)

    def threadgroup_variable(self, p: int, after_alignas: bool) -> None:
        """threadgroup T x[N], y;"""
        t = self.tokens
        end = p
        while t.text[end] not in (";", "=", ""):
            if t.text[end] in ("*", "&"):
                return  # a pointer to threadgroup memory
            if t.text[end] in ("(", "[", "{"):
                end = t.close(end)
            elif t.text[end] == "<" and t.kind[end - 1] == "word":
                end = max(end, t.close_angle(end))
            end += 1
        if t.text[end] != ";":
            self.mistake(p, "a threadgroup variable must not have an initialiser")
            return
        declarators = t.split(p + 1, end)
        name = declarators[0][0]
        while name < declarators[0][1] and t.text[name] != "[":
            if t.text[name] == "<":
                name = max(name, t.close_angle(name))
            name += 1
        name -= 1
        kind = t.words(p + 1, name)
        code = ""
        for a, b in [(name, declarators[0][1]), *declarators[1:]]:
            x = t.text[a]
            kind_of_x = f"using msl_type_{x} = {kind} {t.words(a + 1, b)};"
            code += f"{kind_of_x} MSL_THREADGROUP_VARIABLE({x});"
        begin = t.open(p - 1) - 1 if after_alignas else p
        t.blank(begin, end + 1)
        t.text[p] = code

    def whole_copy(self, p: int) -> None:
        """*(device V*)to = *(threadgroup V*)from;   and its halves"""
        t = self.tokens
        end = t.close(p + 1)
        if t.text[p - 1] not in (";", "{", "}", "=", ")", "return"):
            return
        if not any(t.text[q] in _SPACES for q in range(p, end)):
            return
        if t.text[p - 1] in ("=", "return") and t.text[end + 1] == ";":
            t.text[p] = "msl_load"
        elif t.text[p - 1] != "=" and t.text[end + 1] == "=":
            last = end + 2
            while t.text[last] != ";":
                last = t.close(last) if t.text[last] in ("(", "[", "{") else last
                last += 1
            if t.text[end + 2] == "*" and t.text[end + 3] == "(" and t.close(end + 3) + 1 == last:
                t.text[end + 2] = "msl_load"
            t.text[p], t.text[end + 1], t.text[last] = "msl_store(", ",", ");"

    def constant_variable(self, p: int) -> None:
        """constant os_log log(..);   constant complex64_t x = ..;"""
        t = self.tokens
        begin = p - 1
        while t.kind[begin] == "word" and t.text[begin] not in ("return", "constant"):
            begin -= 1
        if t.text[begin] not in (";", "{", "}", ">", ")", "", ":"):
            return
        end = p + 1
        while t.text[end] not in ("=", ";", "{", "", ")", ",", "*", "&", "("):
            if t.text[end] == "<":
                end = t.close_angle(end)
                if end < 0:
                    return
            elif t.text[end] == "[":
                end = t.close(end)
            end += 1
        # Objects of a class cannot be made or used in this address space.
        is_class = any(n == "os_log" or n.startswith("complex") for n in t.text[begin + 1 : end])
        if is_class and t.text[end] in ("=", ";", "{", "("):
            t.text[p] = "const"

    def array_parameter(self, p: int) -> None:
        """constant const T x[2] as a parameter: C++ has no address space for it but a pointer's."""
        t = self.tokens
        if t.text[p - 1] not in ("(", ",", "const"):
            return
        end = p
        while t.text[end] not in (",", ")", ";", "=", "{", "}", "", "*", "&", "("):
            if t.text[end] == "<":
                end = t.close_angle(end)
                if end < 0:
                    return
            elif t.text[end] == "[":
                end = t.close(end)
            end += 1
        if t.text[end] in (",", ")") and t.text[end - 1] == "]":
            opening = t.open(end - 1)
            if t.kind[opening - 1] == "word" and t.text[opening - 1] not in _SPACES:
                t.blank(opening, end)
                t.text[opening - 1] = "* " + t.text[opening - 1]

    def member_function(self, p: int) -> bool:
        """f() const device {..}: C++ keeps the one for its own memory and drops the others."""
        t = self.tokens
        before = p - 1
        while t.text[before] in ("const", "volatile", "noexcept"):
            before -= 1
        if t.text[before] != ")" or t.text[p + 1] not in ("{", ":", ";", "->", "="):
            return False
        if t.text[p] == "thread":
            t.blank(p, p + 1)
            return True
        begin = t.open(before)
        while t.text[begin - 1] not in (";", "{", "}", "") and not (
            t.text[begin - 1] == ":" and t.text[begin - 2] in ("public", "private", "protected")
        ):
            begin = t.open(begin - 1) if t.text[begin - 1] == ")" else begin - 1
        end = p + 1
        if t.text[end] == ":":  # a constructor's initialisers
            end += 1
            while t.text[end] != "{" or t.text[end - 1] not in (")", "}"):
                end = t.close(end) if t.text[end] in ("(", "{") else end
                end += 1
        while t.text[end] not in ("{", ";"):
            end += 1
        if t.text[end] == "{":
            end = t.close(end)
            end += t.text[end + 1] == ";"
        t.blank(begin, end + 1)
        return True

    def mistake(self, p: int, what: str) -> None:
        self.unit.mistakes.append(f"{self.tokens.where(p)}: {what}")
