#pragma once
// weigh_experts: the weighted sum of what a row's experts gave.

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array weigh_experts(
    const mx::array& parts,
    const mx::array& weights,
    mx::Dtype out_dtype);

Launch weigh_experts_launch(int T, int used, int E, mx::Dtype out_dtype);

class WeighExperts : public mx::Primitive {
 public:
  explicit WeighExperts(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  const char* name() const override {
    return "WeighExperts";
  }
};

} // namespace pyengine
