#pragma once
// quantized_gated_matmul: gelu_tanh(x @ gate.T) * (x @ up.T) for two matrices
// in MLX's affine quantisation.

#include "cpu/integer.h"
#include "cpu/plan.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array quantized_gated_matmul(
    const mx::array& x, // [..., K]
    const mx::array& gate_w, // [N, K * bits / 32]
    const mx::array& gate_scales, // [N, K / group_size]
    const mx::array& gate_biases,
    const mx::array& up_w,
    const mx::array& up_scales,
    const mx::array& up_biases,
    Integer group_size,
    Integer bits);

Plan quantized_gated_matmul_plan(int M, int N, int K, int group_size, int bits);

Launch quantized_gated_matmul_launch(
    int M,
    int N,
    int K,
    mx::Dtype dtype,
    int group_size,
    int bits);

// Inputs in the order of the op's arguments.
class QuantizedGatedMatmul : public mx::Primitive {
 public:
  QuantizedGatedMatmul(mx::Stream stream, int group_size, int bits)
      : mx::Primitive(stream),
        group_size_(group_size),
        bits_(bits) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "QuantizedGatedMatmul";
  }

 private:
  int group_size_;
  int bits_;
};

} // namespace pyengine
