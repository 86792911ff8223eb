#pragma once
// residual_norm: h' = (h + norm(y) * weight) * scalar and the next norm of h'.

#include <optional>
#include <utility>

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

std::pair<mx::array, std::optional<mx::array>> residual_norm(
    const mx::array& h, // [..., E]
    const mx::array& y, // [..., E]
    const mx::array& weight, // [E]
    const std::optional<mx::array>& scalar, // [1]
    const std::optional<mx::array>& next_weight, // [E]
    float eps);

bool residual_norm_has_launch(int E);

Launch residual_norm_launch(
    int rows,
    int E,
    mx::Dtype dtype,
    bool has_scalar,
    bool has_next,
    float eps);

// Inputs: h, y, weight, then scalar and next_weight where given.
class ResidualNorm : public mx::Primitive {
 public:
  ResidualNorm(mx::Stream stream, bool has_scalar, bool has_next, float eps)
      : mx::Primitive(stream),
        has_scalar_(has_scalar),
        has_next_(has_next),
        eps_(eps) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "ResidualNorm";
  }

 private:
  bool has_scalar_;
  bool has_next_;
  float eps_;
};

} // namespace pyengine
