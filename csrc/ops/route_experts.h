#pragma once
// route_experts: which experts a row uses, and their weights.

#include <utility>

#include "cpu/integer.h"
#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

std::pair<mx::array, mx::array>
route_experts(const mx::array& logits, const mx::array& scales, Integer used);

Launch route_experts_launch(int T, int X, int used);

// The Metal kernel chooses up to 32 experts.
bool route_experts_has_launch(int used);

class RouteExperts : public mx::Primitive {
 public:
  RouteExperts(mx::Stream stream, int used)
      : mx::Primitive(stream),
        used_(used) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return used_ == static_cast<const RouteExperts&>(other).used_;
  }
  const char* name() const override {
    return "RouteExperts";
  }

 private:
  int used_;
};

} // namespace pyengine
