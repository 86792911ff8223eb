// launch: small parts of a Launch, and its Python face.

#include "launch.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "metal_sources.h"
#include "op.h"

namespace pyengine {

Buffer Buffer::array(
    Role role,
    std::string name,
    mx::Shape shape,
    mx::Dtype dtype,
    int alignment) {
  return {std::move(name), role, std::move(shape), dtype, alignment, {}};
}

Buffer Buffer::scalar(std::string name, uint32_t value) {
  std::string data(sizeof(value), '\0');
  std::memcpy(data.data(), &value, sizeof(value));
  return {std::move(name), Role::bytes, {}, mx::uint32, 4, std::move(data)};
}

Buffer Buffer::scalar(std::string name, float value) {
  std::string data(sizeof(value), '\0');
  std::memcpy(data.data(), &value, sizeof(value));
  return {std::move(name), Role::bytes, {}, mx::float32, 4, std::move(data)};
}

Buffer Buffer::words(std::string name, const std::vector<uint32_t>& values) {
  std::string data(values.size() * sizeof(uint32_t), '\0');
  std::memcpy(data.data(), values.data(), data.size());
  return {std::move(name), Role::bytes, {}, mx::uint32, 4, std::move(data)};
}

Launch::Launch(
    std::string library,
    std::string kernel,
    std::array<int, 3> grid,
    std::array<int, 3> threadgroup)
    : library(std::move(library)),
      kernel(std::move(kernel)),
      grid(grid),
      threadgroup(threadgroup) {}

Launch
elementwise_launch(std::string library, std::string kernel, size_t size) {
  constexpr int threads = 256;
  int groups = int((size - 1) / threads) + 1;
  return {
      std::move(library), std::move(kernel), {groups, 1, 1}, {threads, 1, 1}};
}

std::string dtype_name(mx::Dtype dtype) {
  std::ostringstream text;
  text << dtype;
  return text.str();
}

namespace {

const MetalKernel& metal_kernel(
    const std::string& library,
    const std::string& kernel) {
  for (const auto& known : metal_kernels) {
    if (kernel == known.name && library == known.library->name) {
      return known;
    }
  }
  throw std::logic_error(
      "[launch] no Metal kernel is named " + kernel + " in " + library + ".");
}

} // namespace

std::string metal_source(
    const std::string& library,
    const std::string& kernel) {
  const auto& known = metal_kernel(library, kernel);
  return std::string(known.library->text) + known.instantiation;
}

std::string compiled_name(
    const std::string& library,
    const std::string& kernel) {
  return "pyengine_" + kernel + "_" + metal_kernel(library, kernel).hash;
}

namespace {

const char* role_name(Buffer::Role role) {
  constexpr const char* names[] = {"in", "out", "inout", "bytes"};
  return names[int(role)];
}

bool names(const std::vector<const Buffer*>& buffers, const std::string& name) {
  return std::any_of(buffers.begin(), buffers.end(), [&](const Buffer* b) {
    return b->name == name;
  });
}

} // namespace

Arguments arguments_of(const std::vector<Launch>& launches) {
  Arguments all;
  std::vector<const Buffer*> between;
  for (const auto& launch : launches) {
    for (const auto& buffer : launch.buffers) {
      if (buffer.role == Role::bytes) {
        continue;
      }
      bool written = names(all.written, buffer.name);
      if (buffer.role == Role::in && written) {
        between.push_back(&buffer);
      } else if (
          buffer.role != Role::out && !written &&
          !names(all.read, buffer.name)) {
        all.read.push_back(&buffer);
      }
      if (buffer.role != Role::in && !written) {
        all.written.push_back(&buffer);
      }
    }
  }
  std::erase_if(
      all.written, [&](const Buffer* b) { return names(between, b->name); });
  return all;
}

namespace {

// What a GPU would run for a lazy result of an op, and the inputs that this
// reads, in order: no launches where there is nothing to compute, nothing in
// their place where no kernel takes the arguments.
std::pair<std::optional<std::vector<Launch>>, Arrays> launches_of(
    const mx::array& result) {
  auto* op = result.has_primitive()
      ? dynamic_cast<const AnyOp*>(&result.primitive())
      : nullptr;
  if (op == nullptr) {
    throw std::invalid_argument(
        "[launches_of] result must be lazy and made by an op of pyengine but "
        "got " +
        (result.has_primitive()
             ? std::string("one of ") + result.primitive().name()
             : std::string("an evaluated array")) +
        ".");
  }
  std::optional<std::vector<Launch>> launches = std::vector<Launch>();
  auto outputs = result.outputs();
  if (!op->empty(result.inputs(), outputs)) {
    launches = op->launches(result.inputs(), outputs);
    if (launches->empty()) {
      launches.reset();
    }
  }
  return {std::move(launches), result.inputs()};
}

} // namespace

void bind_launch(nb::module_& m) {
  nb::class_<Buffer>(m, "Buffer")
      .def_ro("name", &Buffer::name)
      .def_prop_ro("role", [](const Buffer& b) { return role_name(b.role); })
      .def_prop_ro(
          "shape",
          [](const Buffer& b) {
            return std::vector<int>(b.shape.begin(), b.shape.end());
          })
      .def_prop_ro("dtype", [](const Buffer& b) { return dtype_name(b.dtype); })
      .def_ro("alignment", &Buffer::alignment)
      .def_ro("state", &Buffer::state)
      .def_prop_ro("data", [](const Buffer& b) {
        return nb::bytes(b.data.data(), b.data.size());
      });
  nb::class_<Launch>(m, "Launch")
      .def_ro("library", &Launch::library)
      .def_ro("kernel", &Launch::kernel)
      .def_ro("constants", &Launch::constants)
      .def_ro("grid", &Launch::grid)
      .def_ro("threadgroup", &Launch::threadgroup)
      .def_ro("buffers", &Launch::buffers)
      .def_ro("threadgroup_memory", &Launch::threadgroup_memory);
  m.def(
      "launch_arguments",
      [](const std::vector<Launch>& launches) {
        auto copies = [](const std::vector<const Buffer*>& buffers) {
          std::vector<Buffer> copied;
          for (const auto* buffer : buffers) {
            copied.push_back(*buffer);
          }
          return copied;
        };
        auto arguments = arguments_of(launches);
        return std::pair(copies(arguments.read), copies(arguments.written));
      },
      "launches"_a);
  m.def("launches_of", &launches_of, "result"_a);
  m.def(
      "launches_of",
      [](const Arrays& results) {
        return launches_of(results.empty() ? mx::array(0.0f) : results.front());
      },
      "results"_a);
  m.attr("max_launch_rows") = max_launch_rows;
  m.def("metal_source", &metal_source, "library"_a, "kernel"_a);
  m.def("compiled_name", &compiled_name, "library"_a, "kernel"_a);
  m.def("metal_kernels", [] {
    std::vector<std::pair<std::string, std::string>> names;
    for (const auto& known : metal_kernels) {
      names.emplace_back(known.library->name, known.name);
    }
    return names;
  });
}

} // namespace pyengine
