// encode: launches to calls of an encoder, MLX's on a Mac or one that notes.

#include "encode.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "bindings.h"
#ifdef __APPLE__
#include "mlx/backend/metal/device.h"
#endif

namespace pyengine {

namespace {

bool poison = false;

int threads_of(const Launch& launch) {
  return launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2];
}

int threadgroup_bytes(const Launch& launch, const Pipeline& pipeline) {
  int bytes = pipeline.threadgroup_memory;
  for (auto [index, size] : launch.threadgroup_memory) {
    bytes += size;
  }
  return bytes;
}

// MLX keeps libraries and pipelines by name alone, so the name of a library
// carries the hash of its text, and that of a pipeline its constants.
struct Names {
  std::string source;
  std::string library;
  std::string pipeline;
};

Names names_of(const Launch& launch) {
  Names names = {metal_source(launch.library), {}, launch.kernel};
  names.library = "pyengine_" + launch.library + "_" +
      std::to_string(std::hash<std::string>()(names.source));
  for (const auto& [index, value] : launch.constants) {
    std::visit(
        [&](const auto& v) { names.pipeline += "_" + std::to_string(v); },
        value);
  }
  return names;
}

} // namespace

void allocate(mx::array& a) {
  a.set_data(mx::allocator::malloc(a.nbytes()));
  if (poison) {
    std::memset(a.data<char>(), 0xAA, a.nbytes());
  }
}

std::string refusal(
    const std::string& op,
    const Launch& launch,
    const Pipeline& pipeline,
    int threadgroup_memory) {
  auto sentence = [&](const char* what, int limit, const char* unit, int got) {
    return "[" + op + "] " + what + " of " + launch.kernel +
        " must be at most " + std::to_string(limit) + unit +
        " on this GPU but got " + std::to_string(got) + ".";
  };
  int threads = threads_of(launch);
  if (threads > pipeline.max_threads) {
    return sentence("a threadgroup", pipeline.max_threads, " threads", threads);
  }
  int bytes = threadgroup_bytes(launch, pipeline);
  if (bytes > threadgroup_memory) {
    return sentence("threadgroup memory", threadgroup_memory, " bytes", bytes);
  }
  return {};
}

namespace {

// `inputs` and `outputs` stand for the buffers of those roles, in order; an
// inout buffer is an output.
void encode_one(
    const std::string& op,
    const Launch& launch,
    Encoder& encoder,
    const Arrays& inputs,
    Arrays& outputs) {
  auto pipeline = encoder.pipeline(launch);
  auto problem = refusal(op, launch, pipeline, encoder.threadgroup_memory());
  if (!problem.empty()) {
    throw std::runtime_error(problem);
  }
  encoder.set_pipeline(pipeline);
  size_t input = 0, output = 0;
  for (int i = 0; i < int(launch.buffers.size()); ++i) {
    const auto& buffer = launch.buffers[i];
    if (buffer.role == Role::bytes) {
      encoder.set_bytes(buffer.data, i);
    } else if (buffer.role == Role::in) {
      const auto& a = inputs[input++];
      if (a.offset() % buffer.alignment != 0) {
        throw std::runtime_error(
            "[" + op + "] " + buffer.name + " must start on " +
            std::to_string(buffer.alignment) + " bytes but starts at byte " +
            std::to_string(a.offset()) + " of its memory; pass a copy of it.");
      }
      // A copy of a whole cache for every block would go unnoticed
      if (a.size() > 1 && !a.flags().row_contiguous) {
        throw std::runtime_error(
            "[" + op + "] " + buffer.name +
            " must be contiguous on a GPU but got a strided view; pass "
            "mx.contiguous of it.");
      }
      encoder.set_input(a, i);
    } else {
      encoder.set_output(outputs[output++], i);
    }
  }
  for (auto [index, bytes] : launch.threadgroup_memory) {
    encoder.set_threadgroup_memory(bytes, index);
  }
  encoder.dispatch(launch);
}

} // namespace

void encode(
    const std::string& op,
    const std::vector<Launch>& launches,
    Encoder& encoder,
    const Arrays& inputs,
    Arrays& outputs) {
  auto arguments = arguments_of(launches);
  if (inputs.size() != arguments.read.size() ||
      outputs.size() != arguments.written.size()) {
    throw std::logic_error("[" + op + "] launches name other arguments.");
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
    mx::array a(buffer.shape, buffer.dtype, nullptr, {});
    allocate(a);
    encoder.add_temporary(a);
    known.emplace_back(buffer.name, a);
    return a;
  };
  for (const auto& launch : launches) {
    Arrays read, written;
    for (const auto& buffer : launch.buffers) {
      if (buffer.role != Role::bytes) {
        bool reads = buffer.role == Role::in;
        (reads ? read : written).push_back(find(buffer));
      }
    }
    encode_one(op, launch, encoder, read, written);
  }
}

namespace {

// For no device: names and looks up what MLX would, and notes every call.
class Rehearsal final : public Encoder {
 public:
  // What was called, with an index of a buffer and an array's place in memory.
  using Call = std::tuple<std::string, int, uint64_t>;

  Pipeline pipeline(const Launch& launch) override {
    auto names = names_of(launch);
    auto& of_library = libraries_[names.library];
    auto [found, unknown] = of_library.try_emplace(names.pipeline, 0);
    return {&found->second, limits.max_threads, 0};
  }
  int threadgroup_memory() override {
    return limits.threadgroup_memory;
  }
  void set_pipeline(const Pipeline&) override {}
  void set_bytes(const std::string&, int index) override {
    note("bytes", index);
  }
  void set_input(const mx::array& a, int index) override {
    note("input", index, &a);
  }
  void set_output(mx::array& a, int index) override {
    note("output", index, &a);
    // Ids and counts that MLX's own kernels may read next lead nowhere else
    if (mx::issubdtype(a.dtype(), mx::integer)) {
      std::memset(a.data<char>(), 0, a.nbytes());
    }
  }
  void set_threadgroup_memory(int, int index) override {
    note("threadgroup", index);
  }
  void dispatch(const Launch& launch) override {
    ++launches;
    if (notes) {
      calls.emplace_back(launch.kernel, -1, 0);
    }
  }
  void add_temporary(const mx::array&) override {}

  bool on = false;
  bool notes = false;
  Pipeline limits = {nullptr, 1024, 32768};
  int launches = 0;
  std::vector<Call> calls;

 private:
  void note(const char* what, int index, const mx::array* a = nullptr) {
    if (notes) {
      auto place = a ? reinterpret_cast<uint64_t>(a->data<char>()) : 0;
      calls.emplace_back(what, index, place);
    }
  }

  std::unordered_map<std::string, std::unordered_map<std::string, int>>
      libraries_;
};

Rehearsal& rehearsed() {
  static Rehearsal encoder;
  return encoder;
}

} // namespace

bool rehearsing() {
  return rehearsed().on;
}

Encoder& rehearsal() {
  return rehearsed();
}

#ifdef __APPLE__

namespace {

class MetalEncoder final : public Encoder {
 public:
  explicit MetalEncoder(const mx::Stream& stream)
      : device_(mx::metal::device(stream.device)),
        encoder_(mx::metal::get_command_encoder(stream)) {}

  static Pipeline compiled(const Launch& launch, mx::metal::Device& device) {
    auto names = names_of(launch);
    mx::metal::MTLFCList constants;
    for (const auto& [index, value] : launch.constants) {
      std::visit(
          [&, index = index](const auto& v) {
            using T = std::decay_t<decltype(v)>;
            auto type = std::is_same_v<T, bool> ? MTL::DataTypeBool
                : std::is_same_v<T, int>        ? MTL::DataTypeInt
                                                : MTL::DataTypeFloat;
            constants.emplace_back(&v, type, index);
          },
          value);
    }
    auto* library =
        device.get_library(names.library, [&] { return names.source; });
    auto* state =
        device.get_kernel(launch.kernel, library, names.pipeline, constants);
    return {
        state,
        int(state->maxTotalThreadsPerThreadgroup()),
        int(state->staticThreadgroupMemoryLength())};
  }

  Pipeline pipeline(const Launch& launch) override {
    return compiled(launch, device_);
  }
  int threadgroup_memory() override {
    return int(device_.mtl_device()->maxThreadgroupMemoryLength());
  }
  void set_pipeline(const Pipeline& pipeline) override {
    auto* state = static_cast<MTL::ComputePipelineState*>(pipeline.state);
    encoder_.set_compute_pipeline_state(state);
  }
  void set_bytes(const std::string& data, int index) override {
    encoder_.set_bytes(data.data(), int(data.size()), index);
  }
  void set_input(const mx::array& a, int index) override {
    encoder_.set_input_array(a, index);
  }
  void set_output(mx::array& a, int index) override {
    encoder_.set_output_array(a, index);
  }
  void set_threadgroup_memory(int bytes, int index) override {
    encoder_.set_threadgroup_memory_length(bytes, index);
  }
  void dispatch(const Launch& launch) override {
    encoder_.dispatch_threadgroups(
        size_of(launch.grid), size_of(launch.threadgroup));
  }
  void add_temporary(const mx::array& a) override {
    encoder_.add_temporary(a);
  }

 private:
  static MTL::Size size_of(const std::array<int, 3>& size) {
    return MTL::Size(size[0], size[1], size[2]);
  }

  mx::metal::Device& device_;
  mx::metal::CommandEncoder& encoder_;
};

} // namespace

void run_on_gpu(
    const std::string& op,
    const std::vector<Launch>& launches,
    const mx::Stream& stream,
    const Arrays& inputs,
    Arrays& outputs) {
  MetalEncoder encoder(stream);
  encode(op, launches, encoder, inputs, outputs);
}

namespace {

Pipeline compiled(const Launch& launch) {
  return MetalEncoder::compiled(launch, mx::metal::device(mx::Device::gpu));
}

} // namespace

#else

void run_on_gpu(
    const std::string& op,
    const std::vector<Launch>&,
    const mx::Stream&,
    const Arrays&,
    Arrays&) {
  throw std::runtime_error("[" + op + "] was built without Metal; use mx.cpu.");
}

namespace {

Pipeline compiled(const Launch&) {
  throw std::runtime_error(
      "[compile_launch] the extension was built without Metal.");
}

} // namespace

#endif

void bind_encode(nb::module_& m) {
  m.def(
      "compile_launch",
      [](const Launch& launch) {
        auto begin = std::chrono::steady_clock::now();
        auto pipeline = compiled(launch);
        std::chrono::duration<double> seconds =
            std::chrono::steady_clock::now() - begin;
        return std::tuple(
            pipeline.max_threads,
            threadgroup_bytes(launch, pipeline),
            seconds.count());
      },
      "launch"_a,
      "Compiles a launch's kernel on the Metal device, unless this process has.\n"
      "Returns the most threads of a threadgroup, the bytes of threadgroup\n"
      "memory that the launch takes, and the seconds that it took. Raises\n"
      "RuntimeError with the compiler's log, or where there is no Metal.");
  m.def(
      "launch_refusal",
      [](const std::string& op,
         const Launch& launch,
         int max_threads,
         int static_memory,
         int threadgroup_memory) {
        Pipeline pipeline = {nullptr, max_threads, static_memory};
        return refusal(op, launch, pipeline, threadgroup_memory);
      },
      "op"_a,
      "launch"_a,
      "max_threads"_a,
      "static_memory"_a,
      "threadgroup_memory"_a);
  m.def("poison_outputs", [](bool on) { poison = on; }, "on"_a);
  m.def(
      "rehearse",
      [](bool on, bool notes, int max_threads, int threadgroup_memory) {
        auto& encoder = rehearsed();
        encoder.on = on;
        encoder.notes = notes;
        encoder.limits = {nullptr, max_threads, threadgroup_memory};
        encoder.launches = 0;
        encoder.calls.clear();
      },
      "on"_a,
      "notes"_a = false,
      "max_threads"_a = 1024,
      "threadgroup_memory"_a = 32768,
      "From now on ops on a processor are encoded for a GPU that is not there:\n"
      "results have memory, which nothing writes. `notes`: keep the calls.");
  m.def("rehearsed_launches", [] { return rehearsed().launches; });
  m.def("rehearsed_calls", [] { return rehearsed().calls; });
}

} // namespace pyengine
