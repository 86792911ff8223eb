// embed: checks and primitive; the arithmetic is in embed_cpu.cpp.

#include "ops/embed.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "matmul.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/embed_cpu.h"
#include "quantized.h"

namespace pyengine {

namespace {

constexpr const char* op = "embed";

// Width of the rows of a table of three arrays.
int check_packed_table(
    const std::vector<mx::array>& table,
    Integer group_size,
    Integer bits) {
  const auto &w = table[0], &scales = table[1], &biases = table[2];
  check(bits == 4 || bits == 6 || bits == 8, op, "bits", "be 4, 6 or 8", bits);
  check(
      group_size == 32 || group_size == 64 || group_size == 128,
      op,
      "group_size",
      "be 32, 64 or 128",
      group_size);
  check_storage_dtype(op, "scales", scales);
  check(
      scales.ndim() == 2,
      op,
      "scales",
      "have shape [V, E / group_size]",
      scales.shape());
  const char* same = "have the dtype of scales";
  check_dtype(op, "biases", biases, scales.dtype(), same);
  check_shape(op, "biases", biases, scales.shape());
  int64_t width = int64_t(scales.shape(1)) * group_size;
  check(width <= INT32_MAX, op, "E", "be below 2**31", width);
  int E = int(width);
  check_dtype(op, "w", w, mx::uint32, "be uint32");
  check_shape(op, "w", w, {scales.shape(0), packed_width(E, bits)});
  return E;
}

int check_dense_table(const mx::array& w) {
  check_storage_dtype(op, "w", w);
  check(w.ndim() == 2, op, "w", "have shape [V, E]", w.shape());
  return w.shape(1);
}

} // namespace

Launch embed_launch(
    int T,
    int V,
    int E,
    mx::Dtype dtype,
    mx::Dtype out_dtype,
    int group_size,
    int bits,
    float scale) {
  using Role = Buffer::Role;
  constexpr int run = 4; // numbers of a row that a thread makes
  int threads = std::min(256, (E + 32 * run - 1) / (32 * run) * 32);
  Launch launch;
  launch.library = op;
  launch.kernel = std::string(op) + "_" + dtype_name(dtype);
  launch.constants = {
      {0, out_dtype == mx::float32}, {1, bits}, {2, bits ? group_size : 1}};
  launch.grid = {(E + run * threads - 1) / (run * threads), T, 1};
  launch.threadgroup = {threads, 1, 1};
  launch.buffers = {Buffer::array(Role::in, "ids", {T}, mx::int32)};
  if (bits == 0) {
    // Given three times: the kernel has a place for factors
    launch.buffers.insert(
        launch.buffers.end(), 3, Buffer::array(Role::in, "w", {V, E}, dtype));
  } else {
    mx::Shape packed = {V, packed_width(E, bits)};
    mx::Shape factors = {V, E / group_size};
    launch.buffers.push_back(Buffer::array(Role::in, "w", packed, mx::uint32));
    for (const char* name : {"scales", "biases"}) {
      launch.buffers.push_back(Buffer::array(Role::in, name, factors, dtype));
    }
  }
  launch.buffers.push_back(Buffer::array(Role::out, "out", {T, E}, out_dtype));
  launch.buffers.push_back(Buffer::scalar("V", uint32_t(V)));
  launch.buffers.push_back(Buffer::scalar("E", uint32_t(E)));
  launch.buffers.push_back(Buffer::scalar("scale", scale));
  launch.buffers.push_back(Buffer::scalar("minus_zero", -0.0f));
  return launch;
}

mx::array embed(
    const mx::array& ids,
    const std::vector<mx::array>& table,
    Integer group_size,
    Integer bits,
    float scale,
    std::optional<mx::Dtype> out_dtype) {
  check_dtype(op, "ids", ids, mx::int32, "be int32");
  check(
      table.size() == 1 || table.size() == 3,
      op,
      "table",
      "be w alone or w, scales and biases",
      std::to_string(table.size()) + " arrays");
  bool packed = table.size() == 3;
  int E = packed ? check_packed_table(table, group_size, bits)
                 : check_dense_table(table[0]);
  check(
      table[0].shape(0) > 0,
      op,
      "table",
      "have at least 1 row",
      table[0].shape());
  mx::Dtype dtype = out_dtype.value_or(table.back().dtype());
  check(
      dtype == table.back().dtype() || dtype == mx::float32,
      op,
      "out_dtype",
      "be float32 or the dtype of the table",
      dtype);
  auto stream = mx::to_stream({});
  std::vector<mx::array> inputs = {packed_on_gpu(ids, stream)};
  for (const auto& a : table) {
    inputs.push_back(whole(a, stream));
  }
  auto shape = ids.shape();
  shape.push_back(E);
  return mx::array(
      std::move(shape),
      dtype,
      std::make_shared<Embed>(
          stream, group_size, packed ? int(bits) : 0, scale),
      std::move(inputs));
}

void Embed::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  EmbedArgs args = {};
  args.w = inputs[1].data<void>();
  if (bits_ != 0) {
    args.scales = inputs[2].data<void>();
    args.biases = inputs[3].data<void>();
  }
  args.storage = storage_of(inputs.back().dtype());
  args.out = out.data<void>();
  args.out_storage = storage_of(out.dtype());
  args.V = inputs[1].shape(0);
  args.E = out.shape(-1);
  args.group_size = group_size_;
  args.bits = bits_;
  args.scale = scale_;

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  encoder.dispatch([ids = Packed(inputs[0]),
                    rows = int64_t(inputs[0].size()),
                    args]() mutable {
    args.ids = static_cast<const int32_t*>(ids.get());
    split_rows(rows, args.E, [&](int64_t begin, int64_t end) {
      PYENGINE_PICK_KERNEL(embed_rows)(args, begin, end);
    });
  });
}

void Embed::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  auto launch = embed_launch(
      int(inputs[0].size()),
      inputs[1].shape(0),
      out.shape(-1),
      inputs.back().dtype(),
      out.dtype(),
      group_size_,
      bits_,
      scale_);
  auto given = inputs;
  given.resize(4, inputs.back()); // a table of floats three times
  run_on_gpu(launch, stream(), given, outputs);
}

bool Embed::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const Embed&>(other);
  return group_size_ == o.group_size_ && bits_ == o.bits_ && scale_ == o.scale_;
}

void bind_embed(nb::module_& m) {
  m.def(
      "embed",
      &embed,
      nb::arg("ids"),
      nb::arg("table"),
      nb::arg("group_size"),
      nb::arg("bits"),
      nb::arg("scale"),
      nb::arg("out_dtype").none());
  m.def(
      "embed_launch",
      &embed_launch,
      nb::arg("T"),
      nb::arg("V"),
      nb::arg("E"),
      nb::arg("dtype"),
      nb::arg("out_dtype"),
      nb::arg("group_size"),
      nb::arg("bits"),
      nb::arg("scale"));
}

} // namespace pyengine
