#pragma once
// rms_norm: x / sqrt(mean(x^2) + eps) * weight.

#include <optional>

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array rms_norm(
    const mx::array& x, // [..., D]
    const std::optional<mx::array>& weight, // [D]
    float eps);

// Whether the Metal kernel takes rows of this width.
bool rms_norm_has_launch(int D);

Launch
rms_norm_launch(int rows, int D, mx::Dtype dtype, bool weighted, float eps);

class RmsNorm : public mx::Primitive {
 public:
  RmsNorm(mx::Stream stream, float eps) : mx::Primitive(stream), eps_(eps) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "RmsNorm";
  }

 private:
  float eps_;
};

} // namespace pyengine
