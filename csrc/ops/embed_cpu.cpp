// embed_cpu: a row of the table at a time, sixteen numbers at a time.
//
// A weight is q * scale + bias with both steps rounded, as MLX dequantises on a
// processor; a matmul's is fused, and differs in the last bit.

#include "ops/embed_cpu.h"

#include "cpu/lanes.h"
#include "cpu/rows_cpu.h"

namespace pyengine::PYENGINE_ISA {

namespace {

// Sixteen packed integers in their order.
PYENGINE_INLINE F32x16 unpack(const uint8_t* w, int bits) {
  if (bits == 8) {
    return to_float(widen(w));
  }
  float values[lanes];
  for (int i = 0; i < lanes; ++i) {
    int at = i * bits;
    int word = w[at / 8];
    if (at % 8 + bits > 8) {
      word |= w[at / 8 + 1] << 8;
    }
    values[i] = float(word >> at % 8 & ((1 << bits) - 1));
  }
  return load(values);
}

template <typename T>
void quantized_row(const EmbedArgs& args, int64_t id, int64_t at) {
  auto* w = static_cast<const uint8_t*>(args.w) + id * args.E / 8 * args.bits;
  int64_t first = id * (args.E / args.group_size);
  auto* scales = static_cast<const T*>(args.scales) + first;
  auto* biases = static_cast<const T*>(args.biases) + first;
  F32x16 scale = broadcast(args.scale);
  for (int k = 0; k < args.E; k += lanes) {
    int group = k / args.group_size;
    F32x16 q = unpack(w + k * args.bits / 8, args.bits);
    F32x16 weight = q * broadcast(to_float(scales[group])) +
        broadcast(to_float(biases[group]));
    store(args.out, args.out_storage, at + k, weight * scale, lanes);
  }
}

template <typename T>
void dense_row(const EmbedArgs& args, int64_t id, int64_t at) {
  auto* w = static_cast<const T*>(args.w) + id * args.E;
  F32x16 scale = broadcast(args.scale);
  for_lanes(args.E, [&](int64_t k, int some) {
    F32x16 weight = load_some(w + k, some);
    store(args.out, args.out_storage, at + k, weight * scale, some);
  });
}

} // namespace

void embed_rows(const EmbedArgs& args, int64_t begin, int64_t end) {
  with_storage(args.storage, [&]<typename T>(T*) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t id = args.ids[row], at = row * args.E;
      if (id < 0 || args.V <= id) {
        store_nan(args.out, args.out_storage, at, args.E);
      } else if (args.bits == 0) {
        dense_row<T>(args, id, at);
      } else {
        quantized_row<T>(args, id, at);
      }
    }
  });
}

} // namespace pyengine::PYENGINE_ISA
