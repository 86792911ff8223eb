// launch: small parts of a Launch, its Python face, and how a GPU runs it.

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
#include <string_view>

#include "bindings.h"
#include "metal_sources.h"
#include "op.h"
#ifdef __APPLE__
#include "mlx/backend/metal/device.h"
#endif

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

const char* role_name(Buffer::Role role) {
  constexpr const char* names[] = {"in", "out", "inout", "bytes"};
  return names[int(role)];
}

std::string source_of(const std::string& library) {
  for (const auto& [name, source] : metal_sources) {
    if (library == name) {
      return source;
    }
  }
  throw std::logic_error("[launch] no Metal source is named " + library + ".");
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

#ifdef __APPLE__

namespace {

mx::array temporary(const Buffer& buffer, const mx::Stream& stream) {
  mx::array a(buffer.shape, buffer.dtype, nullptr, {});
  a.set_data(mx::allocator::malloc(a.nbytes()));
  mx::metal::get_command_encoder(stream).add_temporary(a);
  return a;
}

// MLX keeps libraries and pipelines by name alone, so the name of a library
// carries the hash of its text, and that of a pipeline its constants.
MTL::ComputePipelineState* pipeline(
    const Launch& launch,
    mx::metal::Device& device) {
  std::string source = source_of(launch.library);
  std::string library = "pyengine_" + launch.library + "_" +
      std::to_string(std::hash<std::string>()(source));
  std::string name = launch.kernel;
  mx::metal::MTLFCList constants;
  for (const auto& [index, value] : launch.constants) {
    std::visit(
        [&, index = index](const auto& v) {
          using T = std::decay_t<decltype(v)>;
          auto type = std::is_same_v<T, bool> ? MTL::DataTypeBool
              : std::is_same_v<T, int>        ? MTL::DataTypeInt
                                              : MTL::DataTypeFloat;
          constants.emplace_back(&v, type, index);
          name += "_" + std::to_string(v);
        },
        value);
  }
  auto* compiled = device.get_library(library, [&] { return source; });
  return device.get_kernel(launch.kernel, compiled, name, constants);
}

MTL::Size size_of(const std::array<int, 3>& size) {
  return MTL::Size(size[0], size[1], size[2]);
}

// `inputs` and `outputs` stand for the buffers of those roles, in order; an
// inout buffer is an output.
void run_one(
    const Launch& launch,
    const mx::Stream& stream,
    const Arrays& inputs,
    Arrays& outputs) {
  auto& device = mx::metal::device(stream.device);
  auto& encoder = mx::metal::get_command_encoder(stream);
  encoder.set_compute_pipeline_state(pipeline(launch, device));
  size_t input = 0, output = 0;
  for (int i = 0; i < int(launch.buffers.size()); ++i) {
    const auto& buffer = launch.buffers[i];
    if (buffer.role == Role::bytes) {
      encoder.set_bytes(buffer.data.data(), int(buffer.data.size()), i);
    } else if (buffer.role == Role::in) {
      const auto& a = inputs[input++];
      if (a.offset() % buffer.alignment != 0) {
        throw std::runtime_error(
            "[" + launch.library + "] " + buffer.name + " must start on " +
            std::to_string(buffer.alignment) + " bytes but starts at byte " +
            std::to_string(a.offset()) + " of its memory; pass a copy of it.");
      }
      // A copy of a whole cache for every block would go unnoticed
      if (a.size() > 1 && !a.flags().row_contiguous) {
        throw std::runtime_error(
            "[" + launch.library + "] " + buffer.name +
            " must be contiguous on a GPU but got a strided view; pass "
            "mx.contiguous of it.");
      }
      encoder.set_input_array(a, i);
    } else {
      encoder.set_output_array(outputs[output++], i);
    }
  }
  for (auto [index, bytes] : launch.threadgroup_memory) {
    encoder.set_threadgroup_memory_length(bytes, index);
  }
  encoder.dispatch_threadgroups(
      size_of(launch.grid), size_of(launch.threadgroup));
}

} // namespace

void run_on_gpu(
    const std::vector<Launch>& launches,
    const mx::Stream& stream,
    const Arrays& inputs,
    Arrays& outputs) {
  auto arguments = arguments_of(launches);
  if (inputs.size() != arguments.read.size() ||
      outputs.size() != arguments.written.size()) {
    throw std::logic_error(
        "[" + launches[0].library + "] launches name other arguments.");
  }
  // An array that is written in place is an output
  std::vector<std::pair<std::string_view, mx::array>> known;
  for (size_t i = 0; i < outputs.size(); ++i) {
    known.emplace_back(arguments.written[i]->name, outputs[i]);
  }
  for (size_t i = 0; i < arguments.read.size(); ++i) {
    known.emplace_back(arguments.read[i]->name, inputs[i]);
  }
  auto find = [&](const Buffer& buffer) {
    for (const auto& [name, a] : known) {
      if (name == buffer.name) {
        return a;
      }
    }
    known.emplace_back(buffer.name, temporary(buffer, stream));
    return known.back().second;
  };
  for (const auto& launch : launches) {
    Arrays read, written;
    for (const auto& buffer : launch.buffers) {
      if (buffer.role != Role::bytes) {
        bool reads = buffer.role == Role::in;
        (reads ? read : written).push_back(find(buffer));
      }
    }
    run_one(launch, stream, read, written);
  }
}

#else

void run_on_gpu(
    const std::vector<Launch>& launches,
    const mx::Stream&,
    const Arrays&,
    Arrays&) {
  throw std::runtime_error(
      "[" + launches[0].library + "] was built without Metal; use mx.cpu.");
}

#endif

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
  m.def("metal_source", &source_of, "library"_a);
}

} // namespace pyengine
