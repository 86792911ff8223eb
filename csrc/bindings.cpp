// bindings.cpp: the module pyengine._ext.

#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind_ops.h"
#include "built_from.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "mlx/version.h"

NB_MODULE(_ext, m) {
  // Registers mx.array with nanobind before the first signature names it.
  nb::module_::import_("mlx.core");

  m.attr("built_for_mlx") = PYENGINE_MLX_VERSION;
  m.attr("built_from") = pyengine::built_from;
  m.def("running_mlx", [] { return std::string(mlx::core::version()); });

  m.def("instruction_sets", &pyengine::instruction_sets);
  m.def("instruction_set", [] {
    return pyengine::instruction_sets()[pyengine::instruction_set()];
  });
  m.def("use_instruction_set", &pyengine::use_instruction_set, "name"_a);

  nb::class_<pyengine::Plan>(m, "Plan")
      .def_ro("slices", &pyengine::Plan::slices)
      .def_ro("groups", &pyengine::Plan::groups)
      .def_ro("columns", &pyengine::Plan::columns)
      .def_ro("scratch", &pyengine::Plan::scratch)
      .def_ro("group_scratch", &pyengine::Plan::group_scratch)
      .def_ro("work", &pyengine::Plan::work);
  m.def("threads_for", &pyengine::threads_for, "work"_a); // for tests

  pyengine::bind_launch(m);
  pyengine::bind_encode(m);
  pyengine::bind_mapped(m);
  pyengine::bind_mathfn(m);
  pyengine::bind_pool(m);
  pyengine::bind_recorded(m);
  pyengine::bind_ops(m);
}
