// quantized_gated_matmul: checks, primitive and the two plans. The arithmetic
// is that of quantized_matmul_cpu.cpp and geglu_cpu.cpp.

#include "ops/quantized_gated_matmul.h"

#include <cstring>
#include <memory>

#include "bindings.h"
#include "cpu/gated.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "quantized.h"

namespace pyengine {

namespace {

constexpr const char* op = "quantized_gated_matmul";

struct Args {
  QuantizedMatmulArgs gate;
  QuantizedMatmulArgs up;
  const float* x;
  void* out; // [M, N], storage
  Storage out_storage;
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
  gated_columns(gate, up, begin, end, scratch, scratch);
  copy_rows(
      reinterpret_cast<const char*>(scratch),
      args.M,
      row_bytes,
      static_cast<char*>(args.out) + begin * size,
      args.N * size);
}

} // namespace

Plan quantized_gated_matmul_plan(
    int M,
    int N,
    int K,
    int group_size,
    int bits) {
  Plan plan = matmul_plan(M, N, K, 2 * (int64_t(K) * bits / 8));
  plan.group_scratch =
      gated_scratch(std::min(M, max_rows), plan.columns, K, group_size, true);
  plan.work *= 2;
  return plan;
}

Launch quantized_gated_matmul_launch(
    int M,
    int N,
    int K,
    mx::Dtype dtype,
    int group_size,
    int bits) {
  using Role = Buffer::Role;
  auto launch = packed_launch(op, M, N, dtype, dtype, group_size, bits, 2);
  launch.buffers = {Buffer::array(Role::in, "x", {M, K}, dtype, 16)};
  for (std::string matrix : {"gate_", "up_"}) {
    add_matrix(launch, matrix, {N}, K, dtype, group_size, bits);
  }
  launch.buffers.push_back(Buffer::array(Role::out, "out", {M, N}, dtype));
  add_scalars(launch, {{"M", M}, {"N", N}, {"K", K}});
  return launch;
}

mx::array quantized_gated_matmul(
    const mx::array& x,
    const mx::array& gate_w,
    const mx::array& gate_scales,
    const mx::array& gate_biases,
    const mx::array& up_w,
    const mx::array& up_scales,
    const mx::array& up_biases,
    Integer group_size,
    Integer bits) {
  check_packed(
      op,
      x,
      {{"gate_", gate_w, gate_scales, gate_biases},
       {"up_", up_w, up_scales, up_biases}},
      group_size,
      bits);

  auto stream = mx::to_stream({});
  auto shape = x.shape();
  shape.back() = gate_w.shape(0);
  std::vector<mx::array> inputs = {rows_of(x, stream)};
  for (const auto* a :
       {&gate_w, &gate_scales, &gate_biases, &up_w, &up_scales, &up_biases}) {
    inputs.push_back(whole(*a, stream));
  }
  return mx::array(
      std::move(shape),
      x.dtype(),
      std::make_shared<QuantizedGatedMatmul>(stream, group_size, bits),
      std::move(inputs));
}

void QuantizedGatedMatmul::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  Rows rows(inputs[0]);
  Args args;
  args.gate = packed_args(&inputs[1], inputs[0], group_size_, bits_);
  args.up = packed_args(&inputs[4], inputs[0], group_size_, bits_);
  args.out = out.data<void>();
  args.out_storage = storage_of(out.dtype());
  args.N = out.shape(-1);
  auto plan = quantized_gated_matmul_plan(
      rows.count(), args.N, args.gate.K, group_size_, bits_);
  Order order = packed_order(bits_);

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  encoder.dispatch([rows = std::move(rows), plan, args, order] {
    run_matmul(rows, plan, args, order, columns);
  });
}

void QuantizedGatedMatmul::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& x = inputs[0];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  int N = out.shape(-1);
  int M = int(out.size() / N);
  auto launch = quantized_gated_matmul_launch(
      M, N, x.shape(-1), x.dtype(), group_size_, bits_);
  run_on_gpu(launch, stream(), inputs, outputs);
}

bool QuantizedGatedMatmul::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const QuantizedGatedMatmul&>(other);
  return group_size_ == o.group_size_ && bits_ == o.bits_;
}

void bind_quantized_gated_matmul(nb::module_& m) {
  m.def(
      "quantized_gated_matmul",
      &quantized_gated_matmul,
      nb::arg("x"),
      nb::arg("gate_w"),
      nb::arg("gate_scales"),
      nb::arg("gate_biases"),
      nb::arg("up_w"),
      nb::arg("up_scales"),
      nb::arg("up_biases"),
      nb::arg("group_size"),
      nb::arg("bits"));
  m.def(
      "quantized_gated_matmul_launch",
      &quantized_gated_matmul_launch,
      nb::arg("M"),
      nb::arg("N"),
      nb::arg("K"),
      nb::arg("dtype"),
      nb::arg("group_size"),
      nb::arg("bits"));
}

} // namespace pyengine
