// quantized_gated_matmul: gelu_tanh(x @ gate.T) * (x @ up.T), or that with
// silu, for two matrices in MLX's affine quantisation. The arithmetic is that
// of quantized_matmul_cpu.cpp and glu_cpu.cpp.

#include <nanobind/stl/string.h>

#include <algorithm>

#include "activation.h"
#include "bindings.h"
#include "check.h"
#include "cpu/gated.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "op.h"
#include "quantized.h"

namespace pyengine {

namespace {

struct Args {
  QuantizedMatmulArgs gate;
  QuantizedMatmulArgs up;
  const float* x;
  void* out; // [M, N], storage
  Storage out_storage;
  Activation activation;
  int M;
  int N;
};

void columns(const Args& args, int begin, int end, float* scratch) {
  QuantizedMatmulArgs gate = args.gate, up = args.up;
  gate.x = up.x = args.x;
  gate.M = up.M = args.M;
  size_t size = args.out_storage == Storage::float32 ? 4 : 2;
  size_t row_bytes = size * (end - begin);
  // The result takes the place of the gates, which are read before it is
  // written.
  gated_columns(gate, up, begin, end, scratch, scratch, args.activation);
  copy_rows(
      reinterpret_cast<const char*>(scratch),
      args.M,
      row_bytes,
      static_cast<char*>(args.out) + begin * size,
      args.N * size);
}

Plan plan_of(int M, int N, int K, int group_size, int bits) {
  Plan plan = matmul_plan(M, N, K, 2 * (int64_t(K) * bits / 8));
  plan.group_scratch =
      gated_scratch(std::min(M, max_rows), plan.columns, K, group_size, true);
  plan.work *= 2;
  return plan;
}

// Inputs in the order of the op's arguments.
struct QuantizedGatedMatmul {
  static constexpr const char* op = "quantized_gated_matmul";
  int group_size;
  int bits;
  Activation activation;
  bool operator==(const QuantizedGatedMatmul&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int N = out[0].shape(-1), K = in[0].shape(-1);
    int M = int(out[0].size() / N);
    if (M > max_launch_rows || !has_short_rows(in[0])) {
      return {};
    }
    auto dtype = in[0].dtype();
    Tile tile = quantized_tile(M, 2 * int64_t(N), dtype, bits, 2);
    auto launch =
        quantized_launch(op, M, N, K, tile, dtype, dtype, group_size, bits, 2);
    launch.constants[4] = activation == Activation::silu;
    launch.buffers = {Buffer::array(Role::in, "x", {M, K}, dtype, 16)};
    for (std::string matrix : {"gate_", "up_"}) {
      add_matrix(launch, matrix, {N}, K, dtype, group_size, bits);
    }
    launch.buffers.push_back(Buffer::array(Role::out, "out", {M, N}, dtype));
    add_scalars(launch, {{"M", M}, {"N", N}, {"K", K}});
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    Rows rows(in[0]);
    Args args = {};
    args.gate = quantized_args(&in[1], in[0], group_size, bits);
    args.up = quantized_args(&in[4], in[0], group_size, bits);
    args.out = out[0].data<void>();
    args.out_storage = storage_of(out[0].dtype());
    args.activation = activation;
    args.N = out[0].shape(-1);
    auto plan = plan_of(rows.count(), args.N, args.gate.K, group_size, bits);
    return [rows = std::move(rows), plan, args, order = quantized_order(bits)] {
      run_matmul(rows, plan, args, order, columns);
    };
  }
};

mx::array quantized_gated_matmul(
    const mx::array& x, // [..., K]
    const mx::array& gate_w, // [N, K * bits / 32]
    const mx::array& gate_scales, // [N, K / group_size]
    const mx::array& gate_biases,
    const mx::array& up_w,
    const mx::array& up_scales,
    const mx::array& up_biases,
    Integer group_size,
    Integer bits,
    const std::string& activation) {
  check_quantized(
      QuantizedGatedMatmul::op,
      x,
      {{"gate_", gate_w, gate_scales, gate_biases},
       {"up_", up_w, up_scales, up_biases}},
      group_size,
      bits);

  auto shape = x.shape();
  shape.back() = gate_w.shape(0);
  Arrays inputs = {x};
  for (const auto* a :
       {&gate_w, &gate_scales, &gate_biases, &up_w, &up_scales, &up_biases}) {
    inputs.push_back(made_contiguous(*a));
  }
  return lazy_result(
      QuantizedGatedMatmul{
          group_size,
          bits,
          activation_of(QuantizedGatedMatmul::op, activation)},
      std::move(shape),
      x.dtype(),
      std::move(inputs));
}

} // namespace

void bind_quantized_gated_matmul(nb::module_& m) {
  m.def(
      "quantized_gated_matmul",
      &quantized_gated_matmul,
      "x"_a,
      "gate_w"_a,
      "gate_scales"_a,
      "gate_biases"_a,
      "up_w"_a,
      "up_scales"_a,
      "up_biases"_a,
      "group_size"_a,
      "bits"_a,
      "activation"_a);
}

} // namespace pyengine
