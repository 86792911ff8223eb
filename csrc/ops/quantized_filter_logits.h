#pragma once
// quantized_filter_logits: quantized_matmul to float32, softcap and
// filter_logits in one op that never holds a row of logits.

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/integer.h"
#include "cpu/plan.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

// As filter_logits.h, n at most 256.
std::tuple<mx::array, mx::array, mx::array> quantized_filter_logits(
    const mx::array& x, // [T, E]
    const mx::array& w, // [V, E * bits / 32]
    const mx::array& scales, // [V, E / group_size]
    const mx::array& biases,
    Integer group_size,
    Integer bits,
    std::optional<float> softcap,
    float temperature,
    Integer top_k,
    float top_p,
    float min_p,
    const std::optional<mx::array>& edit_ids, // [L]
    const std::optional<mx::array>& edit_factors, // [T, L]
    const std::optional<mx::array>& edit_deltas); // [T, L]

Plan quantized_filter_logits_plan(
    int T,
    int V,
    int E,
    int group_size,
    int bits);

// Whether lists of `count` candidates for T rows fit in threadgroup memory.
bool quantized_filter_logits_has_launch(
    int T,
    int V,
    int E,
    int count,
    int bits);

// Two launches: the candidates of slices of the vocabulary, which
// merge_candidates merges.
std::vector<Launch> quantized_filter_logits_launches(
    int T,
    int V,
    int E,
    mx::Dtype dtype, // of x, scales and biases
    int group_size,
    int bits,
    int count,
    std::optional<int> edits, // L
    std::optional<float> softcap,
    float temperature,
    float top_p,
    float min_p);

class QuantizedFilterLogits : public mx::Primitive {
 public:
  QuantizedFilterLogits(
      mx::Stream stream,
      int group_size,
      int bits,
      float softcap, // 0: none
      float temperature,
      float top_p,
      float min_p)
      : mx::Primitive(stream),
        group_size_(group_size),
        bits_(bits),
        softcap_(softcap),
        temperature_(temperature),
        top_p_(top_p),
        min_p_(min_p) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "QuantizedFilterLogits";
  }

 private:
  int group_size_;
  int bits_;
  float softcap_;
  float temperature_;
  float top_p_;
  float min_p_;
};

} // namespace pyengine
