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

// `count` scales or biases from index `first` on, as float32.
void convert(
    const void* from,
    Storage storage,
    int64_t first,
    int64_t count,
    float* to) {
  auto copy = [&](auto values) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      store(to + i, load(values + first + i));
    }
    if (i < count) {
      int rest = int(count - i);
      store(to + i, load(values + first + i, rest), rest);
    }
  };
  switch (storage) {
    case Storage::float32:
      return copy(static_cast<const float*>(from));
    case Storage::float16:
      return copy(static_cast<const Half*>(from));
    case Storage::bfloat16:
      return copy(static_cast<const BFloat*>(from));
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

// scales[c] and biases[c] point to those of the block.
template <int bits, bool halves, int rows, int columns>
PYENGINE_INLINE void multiply_block(
    const uint8_t* const (&w)[columns],
    const float* const (&scales)[columns],
    const float* const (&biases)[columns],
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
              spread<bits, halves>(scales[c], j),
              spread<bits, halves>(biases[c], j));
    }
    PYENGINE_UNROLL
    for (int r = 0; r < rows; ++r) {
      F32x16 values = load(x + lanes * r);
      PYENGINE_UNROLL
      for (int c = 0; c < columns; ++c) {
        acc[r][c] = fma(values, weights[c], acc[r][c]);
      }
    }
    x += pitch;
  }
}

// What a thread works with: columns [begin, end) and their float32 numbers.
struct Group {
  int begin;
  int end;
  float* sums; // [M, end - begin]
  const float* scales; // [end - begin, K / group_size]
  const float* biases;
};

// Rows [m, m + rows) of columns [n, n + columns).
template <int bits, bool halves, int rows, int columns>
void multiply_tile(const Q8MatmulArgs& args, const Group& group, int m, int n) {
  constexpr int block_bytes = block * bits / 8;
  int groups = args.K / args.group_size;
  int pitch = lanes * args.M;
  const float* x = args.x + lanes * m;
  const uint8_t* w[columns];
  const float* scales[columns];
  const float* biases[columns];
  PYENGINE_UNROLL
  for (int c = 0; c < columns; ++c) {
    w[c] = args.w + (n + c) * (int64_t(args.K) * bits / 8);
    scales[c] = group.scales + (n - group.begin + c) * int64_t(groups);
    biases[c] = group.biases + (n - group.begin + c) * int64_t(groups);
  }
  F32x16 acc[rows][columns] = {};

  for (int k = 0; k + block <= args.K; k += block) {
    multiply_block<bits, halves, rows, columns>(
        w, scales, biases, x, pitch, acc);
    // Groups of 128 move on with every second block.
    int step = halves ? 2 : args.group_size == 64 ? 1 : k / block % 2;
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      w[c] += block_bytes;
      scales[c] += step;
      biases[c] += step;
    }
    x += 4 * pitch;
  }
  if (halves && args.K % block != 0) {
    // Half a block is left: x is padded with zeros, the weights are here.
    uint8_t packed[columns][block_bytes] = {};
    float padded[2][columns][2] = {};
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      memcpy(packed[c], w[c], block_bytes / 2);
      padded[0][c][0] = scales[c][0];
      padded[1][c][0] = biases[c][0];
      w[c] = packed[c];
      scales[c] = padded[0][c];
      biases[c] = padded[1][c];
    }
    multiply_block<bits, halves, rows, columns>(
        w, scales, biases, x, pitch, acc);
  }

  int wide = group.end - group.begin;
  float* sums = group.sums + m * wide + n - group.begin;
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      sums[r * wide + c] = sum(acc[r][c]);
    }
  }
}

// Accumulators fill the registers: 16 of 32 for AVX-512, 8 of 16 for AVX2.
constexpr int tile_rows = native == 16 ? 8 : 4;
constexpr int tile_columns(int rows) {
  return native == 16 ? (rows <= 4 ? 4 : 2) : native == 8 && rows <= 2 ? 2 : 1;
}

template <int bits, bool halves>
void multiply(const Q8MatmulArgs& args, const Group& group) {
  // Rows beyond one tile read the group's weights again, from the cache.
  int tiles = (args.M + tile_rows - 1) / tile_rows;
  for (int tile = 0; tile < tiles; ++tile) {
    int m = args.M * tile / tiles;
    int rows = args.M * (tile + 1) / tiles - m;
    with_constant<tile_rows>(rows, [&](auto constant) {
      constexpr int tall = constant.value;
      constexpr int wide = tile_columns(tall);
      int n = group.begin;
      for (; n + wide <= group.end; n += wide) {
        multiply_tile<bits, halves, tall, wide>(args, group, m, n);
      }
      for (; n < group.end; ++n) {
        multiply_tile<bits, halves, tall, 1>(args, group, m, n);
      }
    });
  }
}

template <int bits>
void multiply(const Q8MatmulArgs& args, const Group& group) {
  if (args.group_size == 32) {
    multiply<bits, true>(args, group);
  } else {
    multiply<bits, false>(args, group);
  }
}

} // namespace

void q8_matmul_columns(
    const Q8MatmulArgs& args,
    int begin,
    int end,
    float* scratch) {
  int columns = end - begin;
  int64_t per_column = args.K / args.group_size;
  float* scales = scratch + args.M * columns;
  float* biases = scales + columns * per_column;
  int64_t first = begin * per_column;
  convert(args.scales, args.storage, first, columns * per_column, scales);
  convert(args.biases, args.storage, first, columns * per_column, biases);

  Group group = {begin, end, scratch, scales, biases};
  switch (args.bits) {
    case 8:
      multiply<8>(args, group);
      break;
    case 6:
      multiply<6>(args, group);
      break;
    case 4:
      multiply<4>(args, group);
      break;
  }
  for (int m = 0; m < args.M; ++m) {
    int64_t at = int64_t(m) * args.N + begin;
    store(args.out, args.out_storage, at, scratch + m * columns, columns);
  }
}

} // namespace pyengine::PYENGINE_ISA
