#pragma once
// block_attention: softmax(scale * q @ k.T + mask) @ v for the positions of one
// block against a linear or ring cache.

#include <optional>
#include <vector>

#include "cpu/integer.h"
#include "cpu/plan.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array block_attention(
    const mx::array& q, // [B, T, H, D]
    const mx::array& k, // [B, K, C, D]
    const mx::array& v,
    const mx::array& offset, // int32 []
    float scale,
    std::optional<Integer> window,
    const std::optional<mx::array>& start); // int32 []

// One group per batch and key head, slices of max_rows positions.
Plan block_attention_plan(int B, int T, int H, int K, int C, int D);

// What the Metal kernels serve: longer blocks are prefill, and MLX's.
bool block_attention_has_launch(int T);

// Scores, values and fold of each slice of max_rows positions, in order. Grids
// follow from shapes alone: where a block stands is read on the device.
std::vector<Launch> block_attention_launches(
    int B,
    int T,
    int H,
    int K,
    int C,
    int D,
    mx::Dtype dtype,
    float scale,
    std::optional<int> window,
    bool has_start);

// Inputs: q, k, v, offset, then start where given.
class BlockAttention : public mx::Primitive {
 public:
  BlockAttention(mx::Stream stream, float scale, std::optional<int> window)
      : mx::Primitive(stream),
        scale_(scale),
        window_(window) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "BlockAttention";
  }

 private:
  float scale_;
  std::optional<int> window_;
};

} // namespace pyengine
