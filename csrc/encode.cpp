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
#include "mlx/primitives.h"
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

// MLX keeps libraries and pipelines by name alone, so that of a library carries
// the hash of its text, and that of a pipeline its constants.
std::string pipeline_name(const Launch& launch) {
  std::string name = launch.kernel;
  for (const auto& [index, value] : launch.constants) {
    std::visit([&](const auto& v) { name += "_" + std::to_string(v); }, value);
  }
  return name;
}

bool is_contiguous(const mx::array& a) {
  return a.size() <= 1 || a.flags().row_contiguous;
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

Prepared::Prepared(
    const char* op,
    std::vector<Launch> launches,
    const Arrays& inputs,
    size_t outputs)
    : op_(op) {
  auto arguments = arguments_of(launches);
  if (inputs.size() != arguments.read.size() ||
      outputs != arguments.written.size()) {
    throw std::logic_error(
        std::string("[") + op + "] launches name other arguments.");
  }
  for (const auto& a : inputs) {
    inputs_.emplace_back(a.size(), a.offset() % 16);
  }
  // An array that is written in place is an output
  std::vector<std::pair<std::string, int>> known;
  int count = int(inputs.size() + outputs);
  for (size_t i = 0; i < outputs; ++i) {
    known.emplace_back(arguments.written[i]->name, int(inputs.size() + i));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    known.emplace_back(arguments.read[i]->name, int(i));
  }
  auto number_of = [&](const Buffer& buffer) {
    for (const auto& [name, number] : known) {
      if (name == buffer.name) {
        return number;
      }
    }
    known.emplace_back(buffer.name, count + int(temporaries_.size()));
    temporaries_.push_back(buffer);
    return known.back().second;
  };
  for (auto& launch : launches) {
    std::vector<int> arrays;
    for (const auto& buffer : launch.buffers) {
      arrays.push_back(buffer.role == Role::bytes ? -1 : number_of(buffer));
    }
    launches_.push_back({std::move(launch), std::move(arrays)});
  }
}

bool Prepared::fits(const Arrays& inputs) const {
  if (!op_ || inputs.size() != inputs_.size()) {
    return false;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    auto [size, past] = inputs_[i];
    if (inputs[i].size() != size || inputs[i].offset() % 16 != past) {
      return false;
    }
  }
  return true;
}

namespace {

void check_alignment(const char* op, const Buffer& buffer, const mx::array& a) {
  if (a.offset() % buffer.alignment != 0) {
    throw std::runtime_error(
        std::string("[") + op + "] " + buffer.name + " must start on " +
        std::to_string(buffer.alignment) + " bytes but starts at byte " +
        std::to_string(a.offset()) + " of its memory; pass a copy of it.");
  }
}

// An input as a kernel may read it. A copy of a whole cache for every block
// would go unnoticed, and a write would miss it.
mx::array readable(
    const char* op,
    const Buffer& buffer,
    const mx::array& a,
    Encoder& encoder) {
  if (!is_contiguous(a)) {
    if (buffer.state) {
      throw std::runtime_error(
          std::string("[") + op + "] " + buffer.name +
          " must be contiguous on a GPU but got a strided view; pass "
          "mx.contiguous of it.");
    }
    return encoder.contiguous(a);
  }
  check_alignment(op, buffer, a);
  return a;
}

} // namespace

void encode(
    Prepared& prepared,
    Encoder& encoder,
    const Arrays& inputs,
    Arrays& outputs) {
  // Inputs that had to be copied, by number; the rest are read where they are
  std::vector<std::pair<int, mx::array>> copies;
  Arrays temporaries;
  for (const auto& buffer : prepared.temporaries_) {
    temporaries.emplace_back(
        buffer.shape, buffer.dtype, nullptr, std::vector<mx::array>{});
    allocate(temporaries.back());
    encoder.add_temporary(temporaries.back());
  }
  int read = int(inputs.size()), made = read + int(outputs.size());
  auto input = [&](const Buffer& buffer, int number) {
    for (const auto& [copied, a] : copies) {
      if (copied == number) {
        return a;
      }
    }
    auto a = readable(prepared.op_, buffer, inputs[number], encoder);
    if (a.id() != inputs[number].id()) {
      copies.emplace_back(number, a);
    }
    return a;
  };
  for (auto& [launch, arrays, pipeline] : prepared.launches_) {
    if (!pipeline.state) {
      auto compiled = encoder.pipeline(launch);
      int memory = encoder.threadgroup_memory();
      auto problem = refusal(prepared.op_, launch, compiled, memory);
      if (!problem.empty()) {
        throw std::runtime_error(problem);
      }
      pipeline = compiled;
    }
    // Copies are launches of their own, which must come first
    for (int i = 0; i < int(arrays.size()); ++i) {
      if (launch.buffers[i].role == Role::in && arrays[i] < read) {
        input(launch.buffers[i], arrays[i]);
      }
    }
    encoder.set_pipeline(pipeline);
    for (int i = 0; i < int(arrays.size()); ++i) {
      const auto& buffer = launch.buffers[i];
      int number = arrays[i];
      if (buffer.role == Role::bytes) {
        encoder.set_bytes(buffer.data, i);
      } else if (number >= made) {
        auto& a = temporaries[number - made];
        buffer.role == Role::in ? encoder.set_input(a, i)
                                : encoder.set_output(a, i);
      } else if (number >= read) {
        auto& a = outputs[number - read];
        if (!is_contiguous(a)) {
          throw std::runtime_error(
              std::string("[") + prepared.op_ + "] " + buffer.name +
              " must be contiguous on a GPU to be written in place but got a "
              "strided view.");
        }
        check_alignment(prepared.op_, buffer, a);
        buffer.role == Role::in ? encoder.set_input(a, i)
                                : encoder.set_output(a, i);
      } else {
        auto a = input(buffer, number);
        encoder.set_input(a, i);
        if (buffer.state) {
          encoder.register_output(a);
        }
      }
    }
    for (auto [index, bytes] : launch.threadgroup_memory) {
      encoder.set_threadgroup_memory(bytes, index);
    }
    encoder.dispatch(launch);
  }
}

namespace {

// For no device: names and looks up what MLX would, and notes every call.
class Rehearsal final : public Encoder {
 public:
  // What was called, with an index of a buffer and an array's place in memory.
  using Call = std::tuple<std::string, int, uint64_t>;

  Pipeline pipeline(const Launch& launch) override {
    auto& of_library = libraries_[compiled_name(launch.library, launch.kernel)];
    auto [found, unknown] = of_library.try_emplace(pipeline_name(launch), 0);
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
  void register_output(const mx::array& a) override {
    note("register", -1, &a);
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
  mx::array contiguous(const mx::array& a) override {
    ++launches;
    note("copy", -1, &a);
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    allocate(copy);
    return copy;
  }

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
      : stream_(stream),
        device_(mx::metal::device(stream.device)),
        encoder_(mx::metal::get_command_encoder(stream)) {}

  static Pipeline compiled(const Launch& launch, mx::metal::Device& device) {
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
    auto* library = device.get_library(
        compiled_name(launch.library, launch.kernel),
        [&] { return metal_source(launch.library, launch.kernel); });
    auto* state = device.get_kernel(
        launch.kernel, library, pipeline_name(launch), constants);
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
  void register_output(const mx::array& a) override {
    encoder_.register_output_array(a);
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
  mx::array contiguous(const mx::array& a) override {
    // Run where it is needed: libmlx exports no copy to call
    Arrays copy = {mx::contiguous(a, false, stream_)};
    copy[0].primitive().eval_gpu({a}, copy);
    encoder_.add_temporary(copy[0]);
    return copy[0];
  }

 private:
  static MTL::Size size_of(const std::array<int, 3>& size) {
    return MTL::Size(size[0], size[1], size[2]);
  }

  mx::Stream stream_;
  mx::metal::Device& device_;
  mx::metal::CommandEncoder& encoder_;
};

} // namespace

void run_on_gpu(
    Prepared& prepared,
    const mx::Stream& stream,
    const Arrays& inputs,
    Arrays& outputs) {
  MetalEncoder encoder(stream);
  encode(prepared, encoder, inputs, outputs);
}

namespace {

Pipeline compiled(const Launch& launch) {
  return MetalEncoder::compiled(launch, mx::metal::device(mx::Device::gpu));
}

} // namespace

#else

void run_on_gpu(Prepared&, const mx::Stream&, const Arrays&, Arrays&) {
  throw std::runtime_error(
      "[ops] the extension was built without Metal; use mx.cpu.");
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
