#pragma once
// geglu: gelu_tanh(gate) * up.

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array geglu(
    const mx::array& gate, // [..., F]
    const mx::array& up);

Launch geglu_launch(int64_t size, mx::Dtype dtype);

class Geglu : public mx::Primitive {
 public:
  explicit Geglu(mx::Stream stream) : mx::Primitive(stream) {}

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
    return "Geglu";
  }
};

} // namespace pyengine
