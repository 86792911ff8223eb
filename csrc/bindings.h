#pragma once
// bindings.h: each file binds what is its own, at its end. An op does so as
// bind_X, which CMakeLists.txt lists.

#include <nanobind/nanobind.h>

namespace nb = nanobind;
using namespace nb::literals; // "x"_a: an argument named x

namespace pyengine {

void bind_encode(nb::module_& m);
void bind_launch(nb::module_& m);
void bind_mapped(nb::module_& m);
void bind_mathfn(nb::module_& m);
void bind_pool(nb::module_& m);
void bind_recorded(nb::module_& m);

} // namespace pyengine
