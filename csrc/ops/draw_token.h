#pragma once
// draw_token: one token from each row of candidates.

#include "cpu/integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

// int32 [T].
mx::array draw_token(
    const mx::array& ids, // [T, n]
    const mx::array& probs, // [T, n]
    const mx::array& position, // []
    const mx::array& seed, // []
    Integer index,
    bool shared);

Launch draw_token_launch(int T, int n, int index, bool shared);

class DrawToken : public mx::Primitive {
 public:
  DrawToken(mx::Stream stream, int index, bool shared)
      : mx::Primitive(stream),
        index_(index),
        shared_(shared) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "DrawToken";
  }

 private:
  int index_;
  bool shared_;
};

} // namespace pyengine
