#pragma once
// q8_shared_matmul: x times two or three matrices in MLX's affine quantisation,
// in one launch.

#include "integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "plan.h"

namespace pyengine {

namespace mx = mlx::core;

std::vector<mx::array> q8_shared_matmul(
    const mx::array& x, // [..., K]
    const std::vector<std::vector<mx::array>>& matrices, // w, scales, biases
    Integer group_size,
    Integer bits);

Launch q8_shared_matmul_launch(
    int M,
    const std::vector<int>& N, // of each matrix
    int K,
    mx::Dtype dtype,
    int group_size,
    int bits);

// Inputs: x, then w, scales and biases of each matrix.
class Q8SharedMatmul : public mx::Primitive {
 public:
  Q8SharedMatmul(mx::Stream stream, int group_size, int bits)
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
    return "Q8SharedMatmul";
  }

 private:
  int group_size_;
  int bits_;
};

} // namespace pyengine
