#pragma once
// random_uniform: one Philox number per counter.

#include "cpu/integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array random_uniform(
    const mx::array& counters, // [..., 4]
    uint32_t key0,
    uint32_t key1);

Launch random_uniform_launch(int count, uint32_t key0, uint32_t key1);

class RandomUniform : public mx::Primitive {
 public:
  RandomUniform(mx::Stream stream, uint32_t key0, uint32_t key1)
      : mx::Primitive(stream),
        key0_(key0),
        key1_(key1) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "RandomUniform";
  }

 private:
  uint32_t key0_;
  uint32_t key1_;
};

} // namespace pyengine
