// q8_matmul_cpu: out[m, n] = sum over k of x[m, k] * (q[n, k] * scale + bias).
//
// Four columns at a time stream through their packed weights once, for all rows
// of the slice. Sixteen lanes hold the sums over k = lane (mod 16) in ascending
// order, then a fixed tree adds the lanes: a row's bits cannot depend on how
// many rows or threads there are.

#include "q8_matmul_cpu.h"

#include "rows_cpu.h"
#include "simd.h"

namespace pyengine::PYENGINE_ISA {

namespace {

constexpr int block = 64; // weights unpacked together

// 64 packed weights as numbers, in the Order of their bit width.
template <int bits>
PYENGINE_INLINE void unpack(const uint8_t* w, F32x16 (&q)[4]);

template <>
PYENGINE_INLINE void unpack<8>(const uint8_t* w, F32x16 (&q)[4]) {
  PYENGINE_UNROLL
  for (int j = 0; j < 4; ++j) {
    q[j] = load(w + 16 * j);
  }
}

} // namespace

void q8_matmul_columns(const Q8MatmulArgs& args, int begin, int end) {
  // first version
  for (int n = begin; n < end; ++n) {
    for (int m = 0; m < args.M; ++m) {
      F32x16 acc = zero();
      const uint8_t* w = args.w + size_t(n) * args.K * args.bits / 8;
      for (int k = 0; k < args.K; k += 16) {
        int g = n * (args.K / args.group_size) + k / args.group_size;
        float s = 0, b = 0;
        if (args.storage == Storage::float32) {
          s = ((const float*)args.scales)[g];
          b = ((const float*)args.biases)[g];
        } else if (args.storage == Storage::float16) {
          s = to_float(((const Half*)args.scales)[g]);
          b = to_float(((const Half*)args.biases)[g]);
        } else {
          s = to_float(((const BFloat*)args.scales)[g]);
          b = to_float(((const BFloat*)args.biases)[g]);
        }
        F32x16 q = load(w + k);
        acc =
            fma(fma(q, broadcast(s), broadcast(b)),
                load(args.x + m * padded_width(args.K) + k),
                acc);
      }
      float y = sum(acc);
      size_t o = size_t(m) * args.N + n;
      if (args.out_storage == Storage::float32)
        ((float*)args.out)[o] = y;
      else if (args.out_storage == Storage::float16)
        store((Half*)args.out + o, broadcast(y), 1);
      else
        store((BFloat*)args.out + o, broadcast(y), 1);
    }
  }
}

} // namespace pyengine::PYENGINE_ISA
