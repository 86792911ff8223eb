// quantized_matmul: x @ dequantize(w).T for MLX's affine quantisation. The
// arithmetic is in quantized_matmul_cpu.cpp.

#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings.h"
#include "check.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "op.h"
#include "ops/quantized_matmul_cpu.h"
#include "quantized.h"

namespace pyengine {

namespace {

// Inputs: x, w, scales, biases.
struct QuantizedMatmul {
  static constexpr const char* op = "quantized_matmul";
  int group_size;
  int bits;
  bool operator==(const QuantizedMatmul&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int N = out[0].shape(-1), K = in[0].shape(-1);
    int M = int(out[0].size() / N);
    if (M > max_launch_rows || !has_short_rows(in[0])) {
      return {};
    }
    auto dtype = in[0].dtype(), out_dtype = out[0].dtype();
    Tile tile = quantized_tile(M, N, dtype, bits);
    auto launch =
        quantized_launch(op, M, N, K, tile, dtype, out_dtype, group_size, bits);
    launch.buffers = {Buffer::array(Role::in, "x", {M, K}, dtype, 16)};
    add_matrix(launch, "", {N}, K, dtype, group_size, bits);
    launch.buffers.push_back(
        Buffer::array(Role::out, "out", {M, N}, out_dtype));
    add_scalars(launch, {{"M", M}, {"N", N}, {"K", K}});
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    Rows rows(in[0]);
    auto args = quantized_args(&in[1], in[0], group_size, bits);
    args.out = out[0].data<void>();
    args.out_storage = storage_of(out[0].dtype());
    auto plan =
        quantized_matmul_plan(rows.count(), args.N, args.K, group_size, bits);
    return [rows = std::move(rows), plan, args, order = quantized_order(bits)] {
      auto kernel = PYENGINE_PICK_KERNEL(quantized_matmul_columns);
      run_matmul(rows, plan, args, order, kernel);
    };
  }
};

mx::array quantized_matmul(
    const mx::array& x, // [..., K]
    const mx::array& w, // [N, K * bits / 32]
    const mx::array& scales, // [N, K / group_size]
    const mx::array& biases,
    Integer group_size,
    Integer bits,
    std::optional<mx::Dtype> out_dtype) {
  constexpr auto op = QuantizedMatmul::op;
  check_quantized(op, x, {{"", w, scales, biases}}, group_size, bits);
  mx::Dtype dtype = check_out_dtype(op, x, out_dtype);
  auto shape = x.shape();
  shape.back() = w.shape(0);
  return lazy_result(
      QuantizedMatmul{group_size, bits},
      std::move(shape),
      dtype,
      {x,
       made_contiguous(w),
       made_contiguous(scales),
       made_contiguous(biases)});
}

} // namespace

void bind_quantized_matmul(nb::module_& m) {
  m.def(
      "quantized_matmul",
      &quantized_matmul,
      "x"_a,
      "w"_a,
      "scales"_a,
      "biases"_a,
      "group_size"_a,
      "bits"_a,
      "out_dtype"_a.none());
  m.def(
      "quantized_matmul_plan",
      &quantized_matmul_plan,
      "M"_a,
      "N"_a,
      "K"_a,
      "group_size"_a,
      "bits"_a);
}

} // namespace pyengine
