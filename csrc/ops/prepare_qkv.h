#pragma once
// prepare_qkv: head norms, rotary embedding and the write into the cache.

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

// The queries [1, T, H, D], then keys and values with T positions replaced.
std::vector<mx::array> prepare_qkv(
    const mx::array& q, // [T, H * D]
    const mx::array& k, // [T, K * D]
    const mx::array& v, // [T, K * D]
    const mx::array& q_norm, // [D]
    const mx::array& k_norm, // [D]
    const mx::array& inv_freq, // float32 [D / 2]
    const mx::array& keys, // [1, K, C, D]
    const mx::array& values, // [1, K, C, D]
    const mx::array& offset, // int32 []
    float eps);

Launch prepare_qkv_launch(
    int T,
    int H,
    int K,
    int C,
    int D,
    mx::Dtype dtype,
    float eps);

class PrepareQkv : public mx::Primitive {
 public:
  PrepareQkv(mx::Stream stream, float eps) : mx::Primitive(stream), eps_(eps) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "PrepareQkv";
  }

 private:
  float eps_;
};

} // namespace pyengine
