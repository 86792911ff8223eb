// q8_matmul_cpu: out[m, n] = sum over k of x[m, k] * (q[n, k] * scale + bias).
//
// A few columns at a time stream through their packed weights once, for all
// rows of the slice; a weight is unpacked, dequantised and then multiplied with
// every row while it is in a register. Sixteen lanes add up what lies at k =
// lane (mod 16) in ascending order, then a fixed tree adds the lanes: neither
// the number of rows nor that of threads can change a row's bits.

#include "q8_matmul_cpu.h"

#include "rows_cpu.h"
#include "simd.h"

namespace pyengine::PYENGINE_ISA {

namespace {

constexpr int block = 64; // weights unpacked together: four times 16 lanes
constexpr int chunk = 2048; // weights whose scales are converted together

// The block of 64 as four F32x16, in the Order (rows_cpu.h) of its bit width.
template <int bits>
PYENGINE_INLINE F32x16 unpack(const uint8_t* w, int j) {
  if constexpr (bits == 8) {
    return to_float(widen(w + 16 * j));
  } else if constexpr (bits == 4) {
    I32x16 pair = widen(w + 16 * (j / 2));
    return to_float(j % 2 == 0 ? pair & 0xf : pair >> 4);
  } else {
    // Four weights lie in three bytes, the first in the lowest bits.
    I32x16 quad = widen_triples(w);
    return to_float((quad >> (6 * j)) & 0x3f);
  }
}

// Scales (or biases) of one column as float32. Two per block for groups of 32,
// one otherwise.
template <typename T>
void convert(const T* from, int group_size, int count, float* to) {
  if (group_size == 128) {
    for (int i = 0; i < count; ++i) {
      to[i] = to_float(from[i / 2]);
    }
    return;
  }
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(to + i, load(from + i));
  }
  if (i < count) {
    store(to + i, load(from + i, count - i));
  }
}

void convert(
    const Q8MatmulArgs& args,
    const void* from,
    int n,
    int k,
    int count,
    float* to) {
  int64_t first = int64_t(n) * (args.K / args.group_size) + k / args.group_size;
  switch (args.storage) {
    case Storage::float32:
      return convert(
          static_cast<const float*>(from) + first, args.group_size, count, to);
    case Storage::float16:
      return convert(
          static_cast<const Half*>(from) + first, args.group_size, count, to);
    case Storage::bfloat16:
      return convert(
          static_cast<const BFloat*>(from) + first, args.group_size, count, to);
  }
}

// One factor per lane: for groups of 32 the block's first half uses values[0],
// its second half values[1].
template <int bits, bool halves>
PYENGINE_INLINE F32x16 spread(const float* values, int j) {
  if constexpr (!halves) {
    return broadcast(values[0]);
  } else if constexpr (bits == 6) {
    return broadcast(values[0], values[1]);
  } else {
    return broadcast(values[j / 2]);
  }
}

template <int bits, bool halves, int rows, int columns>
PYENGINE_INLINE void multiply_block(
    const uint8_t* const (&w)[columns],
    const float (&scales)[columns][chunk / 32],
    const float (&biases)[columns][chunk / 32],
    int group,
    const float* x,
    int pitch,
    F32x16 (&acc)[rows][columns]) {
  PYENGINE_UNROLL
  for (int j = 0; j < 4; ++j) {
    F32x16 weights[columns];
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      weights[c] =
          fma(unpack<bits>(w[c], j),
              spread<bits, halves>(&scales[c][group], j),
              spread<bits, halves>(&biases[c][group], j));
    }
    PYENGINE_UNROLL
    for (int r = 0; r < rows; ++r) {
      F32x16 values = load(x + r * int64_t(pitch) + 16 * j);
      PYENGINE_UNROLL
      for (int c = 0; c < columns; ++c) {
        acc[r][c] = fma(values, weights[c], acc[r][c]);
      }
    }
  }
}

// Rows [m, m + rows) of columns [n, n + columns).
template <int bits, bool halves, int rows, int columns>
void multiply_tile(const Q8MatmulArgs& args, int m, int n) {
  constexpr int block_bytes = block * bits / 8;
  constexpr int per_block = halves ? 2 : 1;
  int pitch = padded_width(args.K);
  const float* x = args.x + m * int64_t(pitch);
  const uint8_t* w[columns];
  for (int c = 0; c < columns; ++c) {
    w[c] = args.w + (n + c) * (int64_t(args.K) * bits / 8);
  }
  float scales[columns][chunk / 32];
  float biases[columns][chunk / 32];
  F32x16 acc[rows][columns] = {};

  for (int start = 0; start < args.K; start += chunk) {
    int width = args.K - start < chunk ? args.K - start : chunk;
    for (int c = 0; c < columns; ++c) {
      int count = width * per_block / block;
      convert(args, args.scales, n + c, start, count, scales[c]);
      convert(args, args.biases, n + c, start, count, biases[c]);
    }
    int group = 0;
    for (int k = 0; k + block <= width; k += block, group += per_block) {
      multiply_block<bits, halves, rows, columns>(
          w, scales, biases, group, x, pitch, acc);
      for (int c = 0; c < columns; ++c) {
        w[c] += block_bytes;
      }
      x += block;
    }
    if (halves && width % block != 0) {
      // Half a block is left; x is padded with zeros, the weights are here.
      uint8_t padded[columns][block_bytes] = {};
      const uint8_t* tail[columns];
      for (int c = 0; c < columns; ++c) {
        memcpy(padded[c], w[c], block_bytes / 2);
        tail[c] = padded[c];
        scales[c][group + 1] = biases[c][group + 1] = 0.0f;
      }
      multiply_block<bits, halves, rows, columns>(
          tail, scales, biases, group, x, pitch, acc);
    }
  }

  for (int r = 0; r < rows; ++r) {
    float sums[lanes];
    for (int c = 0; c < columns; ++c) {
      sums[c] = sum(acc[r][c]);
    }
    int64_t at = (m + r) * int64_t(args.N) + n;
    store(args.out, args.out_storage, at, load(sums), columns);
  }
}

// Accumulators fill the registers: 16 of 32 for AVX-512, 8 of 16 for AVX2.
constexpr int tile_rows = native == 16 ? 8 : 4;
constexpr int tile_columns(int rows) {
  return native == 16 ? (rows <= 4 ? 4 : 2) : native == 8 && rows <= 2 ? 2 : 1;
}

template <int bits, bool halves, int rows>
void multiply_columns(const Q8MatmulArgs& args, int m, int begin, int end) {
  constexpr int columns = tile_columns(rows);
  int n = begin;
  for (; n + columns <= end; n += columns) {
    multiply_tile<bits, halves, rows, columns>(args, m, n);
  }
  for (; n < end; ++n) {
    multiply_tile<bits, halves, rows, 1>(args, m, n);
  }
}

template <int bits, bool halves>
void multiply(const Q8MatmulArgs& args, int begin, int end) {
  // Rows beyond one tile read the group's weights again, from the cache.
  int tiles = (args.M + tile_rows - 1) / tile_rows;
  for (int tile = 0; tile < tiles; ++tile) {
    int m = args.M * tile / tiles;
    int rows = args.M * (tile + 1) / tiles - m;
    with_constant<tile_rows>(rows, [&](auto constant) {
      multiply_columns<bits, halves, constant.value>(args, m, begin, end);
    });
  }
}

template <int bits>
void multiply(const Q8MatmulArgs& args, int begin, int end) {
  if (args.group_size == 32) {
    multiply<bits, true>(args, begin, end);
  } else {
    multiply<bits, false>(args, begin, end);
  }
}

} // namespace

void q8_matmul_columns(const Q8MatmulArgs& args, int begin, int end) {
  switch (args.bits) {
    case 8:
      return multiply<8>(args, begin, end);
    case 6:
      return multiply<6>(args, begin, end);
    case 4:
      return multiply<4>(args, begin, end);
  }
}

} // namespace pyengine::PYENGINE_ISA
