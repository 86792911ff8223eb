// embed: rows of a table by token id, dequantised and scaled. The arithmetic is
// in embed_cpu.cpp.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "matmul.h"
#include "op.h"
#include "ops/embed_cpu.h"
#include "quantized.h"

namespace pyengine {

namespace {

// Inputs: ids, and w alone or w, scales and biases.
struct Embed {
  static constexpr const char* op = "embed";
  int group_size;
  int bits; // 0 for a table of floats
  float scale;
  bool operator==(const Embed&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    constexpr int run = 4; // numbers of a row that a thread makes
    int T = int(in[0].size()), V = in[1].shape(0), E = out[0].shape(-1);
    auto dtype = in.back().dtype(), out_dtype = out[0].dtype();
    int threads = std::min(256, (E + 32 * run - 1) / (32 * run) * 32);
    Launch launch(
        op,
        std::string(op) + "_" + dtype_name(dtype),
        {(E + run * threads - 1) / (run * threads), T, 1},
        {threads, 1, 1});
    launch.constants = {
        {0, out_dtype == mx::float32}, {1, bits}, {2, bits ? group_size : 1}};
    launch.buffers = {Buffer::array(Role::in, "ids", {T}, mx::int32)};
    if (bits == 0) {
      // Given three times: the kernel has a place for factors
      launch.buffers.insert(
          launch.buffers.end(), 3, Buffer::array(Role::in, "w", {V, E}, dtype));
    } else {
      mx::Shape weights = {V, quantized_width(E, bits)};
      mx::Shape factors = {V, E / group_size};
      launch.buffers.push_back(
          Buffer::array(Role::in, "w", weights, mx::uint32));
      for (const char* name : {"scales", "biases"}) {
        launch.buffers.push_back(Buffer::array(Role::in, name, factors, dtype));
      }
    }
    launch.buffers.push_back(
        Buffer::array(Role::out, "out", {T, E}, out_dtype));
    launch.buffers.push_back(Buffer::scalar("V", uint32_t(V)));
    launch.buffers.push_back(Buffer::scalar("E", uint32_t(E)));
    launch.buffers.push_back(Buffer::scalar("scale", scale));
    launch.buffers.push_back(Buffer::scalar("minus_zero", -0.0f));
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    EmbedArgs args = {};
    args.w = in[1].data<void>();
    if (bits != 0) {
      args.scales = in[2].data<void>();
      args.biases = in[3].data<void>();
    }
    args.storage = storage_of(in.back().dtype());
    args.out = out[0].data<void>();
    args.out_storage = storage_of(out[0].dtype());
    args.V = in[1].shape(0);
    args.E = out[0].shape(-1);
    args.group_size = group_size;
    args.bits = bits;
    args.scale = scale;
    return [ids = Contiguous(in[0]),
            rows = int64_t(in[0].size()),
            args]() mutable {
      args.ids = ids.get<int32_t>();
      split_rows(rows, args.E, PYENGINE_PICK_KERNEL(embed_rows), args);
    };
  }
};

constexpr auto op = Embed::op;

// Width of the rows of a table of three arrays.
int check_quantized_table(
    const Arrays& table,
    Integer group_size,
    Integer bits) {
  const auto &w = table[0], &scales = table[1], &biases = table[2];
  check_quantisation(op, group_size, bits);
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
  check_array(
      op, "w", w, mx::uint32, {scales.shape(0), quantized_width(E, bits)});
  return E;
}

int check_dense_table(const mx::array& w) {
  check_storage_dtype(op, "w", w);
  check(w.ndim() == 2, op, "w", "have shape [V, E]", w.shape());
  return w.shape(1);
}

mx::array embed(
    const mx::array& ids,
    const Arrays& table, // w alone, or w, scales and biases
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
  bool quantized = table.size() == 3;
  int E = quantized ? check_quantized_table(table, group_size, bits)
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
  Arrays inputs = {ids};
  for (const auto& a : table) {
    inputs.push_back(made_contiguous(a));
  }
  auto shape = ids.shape();
  shape.push_back(E);
  return lazy_result(
      Embed{group_size, quantized ? int(bits) : 0, scale},
      std::move(shape),
      dtype,
      std::move(inputs));
}

} // namespace

void bind_embed(nb::module_& m) {
  m.def(
      "embed",
      &embed,
      "ids"_a,
      "table"_a,
      "group_size"_a,
      "bits"_a,
      "scale"_a,
      "out_dtype"_a.none());
}

} // namespace pyengine
