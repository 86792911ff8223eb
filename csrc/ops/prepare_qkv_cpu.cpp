// prepare_qkv_cpu: a row's angles serve its queries and its keys; keys and
// values go straight to their place.

#include "ops/prepare_qkv_cpu.h"

#include "../metal/positions.h"
#include "cpu/rope.h"

namespace pyengine::PYENGINE_ISA {

namespace {

template <typename T>
void prepare_rows(const PrepareQkvArgs& args, int64_t begin, int64_t end) {
  int H = args.H, K = args.K, D = args.D;
  auto* q_weight = static_cast<const T*>(args.q_weight);
  auto* k_weight = static_cast<const T*>(args.k_weight);
  Angles angles;
  for (int64_t row = begin; row < end; ++row) {
    int position = args.positions[row];
    angles.set(position, args.inv_freq, D);
    for (int64_t head = row * H; head < (row + 1) * H; ++head) {
      auto* q = static_cast<const T*>(args.q) + head * D;
      auto* out = static_cast<T*>(args.out) + head * D;
      rotate_head(q, q_weight, angles, D, args.eps, out);
    }
    int slot = args.slots[row];
    int page =
        page_of(args.tables, args.Q, args.N, args.P, args.owners[row], slot);
    if (page < 0) {
      continue;
    }
    for (int64_t head = 0; head < K; ++head) {
      int64_t from = (row * K + head) * D;
      int64_t line = (page * int64_t(K) + head) * page_size;
      int64_t to = (line + slot % page_size) * D;
      auto* k = static_cast<const T*>(args.k) + from;
      auto* v = static_cast<const T*>(args.v) + from;
      auto* keys = static_cast<T*>(args.keys) + to;
      auto* values = static_cast<T*>(args.values) + to;
      rotate_head(k, k_weight, angles, D, args.eps, keys);
      float scale = args.norm_values ? inverse_rms(v, D, args.eps) : 1.0f;
      scale_row<T>(v, scale, nullptr, D, values);
    }
  }
}

} // namespace

void prepare_qkv_rows(const PrepareQkvArgs& args, int64_t begin, int64_t end) {
  with_storage(
      args.storage, [&]<typename T>(T*) { prepare_rows<T>(args, begin, end); });
}

} // namespace pyengine::PYENGINE_ISA
