#pragma once
// dense_matmul: x @ w.T for weights in a storage dtype.

#include <optional>

#include "cpu/plan.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array dense_matmul(
    const mx::array& x, // [..., K]
    const mx::array& w, // [N, K]
    std::optional<mx::Dtype> out_dtype);

Plan dense_matmul_plan(int M, int N, int K, size_t itemsize);

Launch dense_matmul_launch(
    int M,
    int N,
    int K,
    mx::Dtype dtype, // of x and w
    mx::Dtype out_dtype);

class DenseMatmul : public mx::Primitive {
 public:
  explicit DenseMatmul(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return true;
  }
  const char* name() const override {
    return "DenseMatmul";
  }
};

} // namespace pyengine
