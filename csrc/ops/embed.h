#pragma once
// embed: rows of a table by token id, dequantised and scaled.

#include <optional>
#include <vector>

#include "cpu/integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

// table: w alone, or w, scales and biases of a quantised one.
mx::array embed(
    const mx::array& ids,
    const std::vector<mx::array>& table,
    Integer group_size,
    Integer bits,
    float scale,
    std::optional<mx::Dtype> out_dtype);

// `bits` 0 is a table of floats.
Launch embed_launch(
    int T,
    int V,
    int E,
    mx::Dtype dtype,
    mx::Dtype out_dtype,
    int group_size,
    int bits,
    float scale);

class Embed : public mx::Primitive {
 public:
  Embed(mx::Stream stream, int group_size, int bits, float scale)
      : mx::Primitive(stream),
        group_size_(group_size),
        bits_(bits),
        scale_(scale) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "Embed";
  }

 private:
  int group_size_;
  int bits_;
  float scale_;
};

} // namespace pyengine
