#pragma once
// quantized_expert_matmul: each row times the quantised matrices of the experts
// that it was routed to.

#include <optional>

#include "cpu/integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array quantized_expert_matmul(
    const mx::array& x, // [T, K] or [T, U, K]
    const std::vector<mx::array>& stack, // w, scales, biases [X, N, ...]
    const std::vector<mx::array>& up, // the same again, or empty
    const mx::array& ids, // int32 [T, U]
    Integer group_size,
    Integer bits,
    std::optional<mx::Dtype> out_dtype);

// The Metal kernel lists up to 32 experts of a token.
bool quantized_expert_matmul_has_launch(int U);
Launch quantized_expert_matmul_launch(
    int T,
    int U,
    int X,
    int N,
    int K,
    bool gated,
    bool shared, // one row of x for all experts of a token
    mx::Dtype dtype,
    mx::Dtype out_dtype,
    int group_size,
    int bits);

// Inputs: x, w, scales, biases, then the three of up where given, then ids.
class QuantizedExpertMatmul : public mx::Primitive {
 public:
  QuantizedExpertMatmul(mx::Stream stream, int group_size, int bits)
      : mx::Primitive(stream),
        group_size_(group_size),
        bits_(bits) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "QuantizedExpertMatmul";
  }

 private:
  int group_size_;
  int bits_;
};

} // namespace pyengine
