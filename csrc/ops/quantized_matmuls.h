#pragma once
// quantized_matmuls: x times two or three matrices in MLX's affine
// quantisation, in one launch.

#include "cpu/integer.h"
#include "cpu/plan.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

std::vector<mx::array> quantized_matmuls(
    const mx::array& x, // [..., K]
    const std::vector<std::vector<mx::array>>& matrices, // w, scales, biases
    Integer group_size,
    Integer bits);

Launch quantized_matmuls_launch(
    int M,
    const std::vector<int>& N, // of each matrix
    int K,
    mx::Dtype dtype,
    int group_size,
    int bits);

// Inputs: x, then w, scales and biases of each matrix.
class QuantizedMatmuls : public mx::Primitive {
 public:
  QuantizedMatmuls(mx::Stream stream, int group_size, int bits)
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
    return "QuantizedMatmuls";
  }

 private:
  int group_size_;
  int bits_;
};

} // namespace pyengine
