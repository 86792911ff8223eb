#pragma once
// accept_block: how many drafts of a block are kept, and what follows them.

#include <string>
#include <utility>

#include "cpu/integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

// Drafts kept, int32 [], and the next token, int32 [1].
std::pair<mx::array, mx::array> accept_block(
    const mx::array& p_ids, // [k + 1, n]
    const mx::array& p_probs, // [k + 1, n]
    const mx::array& q_ids, // [k, m]
    const mx::array& q_probs, // [k, m]
    const mx::array& drafts, // [k]
    const mx::array& position, // []
    const mx::array& seed, // []
    const std::string& rule,
    Integer vocab);

enum class Rule : int { residual, block, coupled };

// The Metal kernel takes rows of up to 256 candidates and 128 drafts.
bool accept_block_has_launch(int k, int n, int m);
Launch accept_block_launch(int k, int n, int m, Rule rule, int vocab);

class AcceptBlock : public mx::Primitive {
 public:
  AcceptBlock(mx::Stream stream, Rule rule, int vocab)
      : mx::Primitive(stream),
        rule_(rule),
        vocab_(vocab) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "AcceptBlock";
  }

 private:
  Rule rule_;
  int vocab_;
};

} // namespace pyengine
