#pragma once
// quantized_matmul: x @ dequantize(w).T for MLX's affine quantisation.

#include <optional>

#include "cpu/integer.h"
#include "cpu/plan.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array quantized_matmul(
    const mx::array& x, // [..., K]
    const mx::array& w, // [N, K * bits / 32]
    const mx::array& scales, // [N, K / group_size]
    const mx::array& biases,
    Integer group_size,
    Integer bits,
    std::optional<mx::Dtype> out_dtype);

Plan quantized_matmul_plan(int M, int N, int K, int group_size, int bits);

Launch quantized_matmul_launch(
    int M,
    int N,
    int K,
    mx::Dtype dtype, // of x, scales and biases
    mx::Dtype out_dtype,
    int group_size,
    int bits);

class QuantizedMatmul : public mx::Primitive {
 public:
  QuantizedMatmul(mx::Stream stream, int group_size, int bits)
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
    return "QuantizedMatmul";
  }

 private:
  int group_size_;
  int bits_;
};

} // namespace pyengine
