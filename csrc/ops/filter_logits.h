#pragma once
// filter_logits: a row of logits to the candidates that are sampled from.

#include <optional>
#include <tuple>

#include "cpu/integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

// ids int32 [T, n], probabilities float32 [T, n] and flags int32 [T]; n is
// min(top_k, V), V for top_k 0, 1 for temperature 0.
std::tuple<mx::array, mx::array, mx::array> filter_logits(
    const mx::array& logits, // [T, V]
    float temperature,
    Integer top_k,
    float top_p,
    float min_p,
    const std::optional<mx::array>& edit_ids, // [L]
    const std::optional<mx::array>& edit_factors, // [T, L]
    const std::optional<mx::array>& edit_deltas); // [T, L]

constexpr int max_merged = 16384;

// The Metal kernels keep up to 256 candidates, of up to 262144 logits; of more
// logits fewer.
bool filter_logits_has_launch(int V, int count);

// Two launches: the candidates of slices of 4096 logits, which are merged.
// `aligned`: every row of logits starts on 16 bytes.
std::vector<Launch> filter_logits_launches(
    int T,
    int V,
    int count,
    std::optional<int> edits, // L
    float temperature,
    float top_p,
    float min_p,
    bool aligned);

// The second of them, for candidates from elsewhere: uint64 [T, slices, count]
// and flags uint32 [T, slices], as metal/filter.h has them;
// slices * count at most max_merged.
Launch
merge_candidates_launch(int T, int slices, int count, float top_p, float min_p);

class FilterLogits : public mx::Primitive {
 public:
  FilterLogits(mx::Stream stream, float temperature, float top_p, float min_p)
      : mx::Primitive(stream),
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
    return "FilterLogits";
  }

 private:
  float temperature_;
  float top_p_;
  float min_p_;
};

} // namespace pyengine
