#pragma once
// write_cache: T rows of keys or values into a linear or ring cache, in place.

#include "launch.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace pyengine {

namespace mx = mlx::core;

mx::array write_cache(
    const mx::array& cache, // [B, K, C, D]
    const mx::array& new_rows, // [B, T, K, D]
    const mx::array& offset); // int32 []

Launch write_cache_launch(int B, int T, int K, int C, int D, mx::Dtype dtype);

// The output takes the cache's buffer whether or not anyone else still holds
// it. MLX donates a buffer only when nothing queued reads it, so with donation
// every write after a read would copy the cache. is_equivalent stays false: two
// equal writes are two writes.
class WriteCache : public mx::Primitive {
 public:
  explicit WriteCache(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "WriteCache";
  }
};

} // namespace pyengine
