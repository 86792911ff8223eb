#pragma once
// softcap: cap * tanh(x / cap).

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array softcap(const mx::array& x, float cap);

Launch softcap_launch(int64_t size, float cap);

class Softcap : public mx::Primitive {
 public:
  Softcap(mx::Stream stream, float cap) : mx::Primitive(stream), cap_(cap) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return cap_ == static_cast<const Softcap&>(other).cap_;
  }
  const char* name() const override {
    return "Softcap";
  }

 private:
  float cap_;
};

} // namespace pyengine
