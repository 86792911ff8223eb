#pragma once
// norm_rope: RMSNorm over each head, then half-split rotary embedding.

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array norm_rope(
    const mx::array& x, // [B, T, H, D]
    const mx::array& weight, // [D]
    const mx::array& offset, // int32 []
    const mx::array& inv_freq, // float32 [D / 2]
    float eps);

Launch norm_rope_launch(int B, int T, int H, int D, mx::Dtype dtype, float eps);

class NormRope : public mx::Primitive {
 public:
  NormRope(mx::Stream stream, float eps) : mx::Primitive(stream), eps_(eps) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "NormRope";
  }

 private:
  float eps_;
};

} // namespace pyengine
