// quantized_matmul_cpu: out[m, n] = sum over k of x[m, k] * (q[n, k] * scale +
// bias).
//
// A weight is unpacked and dequantised once for all rows of the slice: few rows
// are multiplied with it while it is in a register, and columns stream through
// their packed weights (tiles.h); more go block by block (blocked.h). Sixteen
// lanes add up what lies at k = lane (mod 16) in ascending order, then a fixed
// tree adds the lanes: neither the number of rows nor that of threads can
// change a row's bits.
//
// Sets that multiply bytes take rows of bfloat16 as whole numbers (planes.h).

#include "ops/quantized_matmul_cpu.h"

#include "cpu/blocked.h"
#include "cpu/lanes.h"
#include "cpu/plane_dots.h"
#include "cpu/plane_tiles.h"
#include "cpu/rows_cpu.h"
#include "cpu/tiles.h"

namespace pyengine::PYENGINE_ISA {

namespace {

constexpr int chunk = 64; // weights unpacked together: four times 16 lanes

// The chunk of 64 as four F32x16, in the Order (rows_cpu.h) of its bit width.
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
  with_storage(storage, [&]<typename T>(T*) {
    auto* values = static_cast<const T*>(from) + first;
    for_lanes(count, [&](int64_t i, int some) {
      store_some(to + i, load_some(values + i, some), some);
    });
  });
}

// The factor of each lane. Groups of 32 have two factors per chunk, the second
// `second` = 1 after the first; larger groups have one, and `second` is 0. It
// is a constant so that a single factor is loaded once: one row waits for
// loads.
template <int bits, int second>
PYENGINE_INLINE F32x16 spread(const float* factors, int j) {
  if constexpr (bits == 6) {
    return broadcast(factors[0], factors[second]);
  } else {
    return broadcast(factors[j < 2 ? 0 : second]);
  }
}

// The columns that a thread works on, [begin, end).
struct Group {
  int begin;
  int end;
  float* sums; // [M, end - begin]
  float* factors; // room for theirs (factors_of)
};

// Those of columns from `first` on as float32, [columns, K / group_size].
struct Factors {
  int first;
  const float* scales;
  const float* biases;
};

// Those of columns [begin, end) to `to`.
Factors convert_factors(
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* to) {
  int64_t per_column = args.K / args.group_size;
  int64_t first = begin * per_column, count = (end - begin) * per_column;
  convert(args.scales, args.storage, first, count, to);
  convert(args.biases, args.storage, first, count, to + count);
  return {begin, to, to + count};
}

void prefetch_factors(const QuantizedMatmulArgs& args, int begin, int end) {
  int64_t size = args.storage == Storage::float32 ? 4 : 2;
  int64_t bytes = args.K / args.group_size * size;
  const void* const both[] = {args.scales, args.biases};
  for (const void* of : both) {
    const char* at = static_cast<const char*>(of) + begin * bytes;
    for (int64_t i = 0; i < (end - begin) * bytes; i += 64) {
      prefetch(at + i);
    }
  }
}

// Where the weights of some columns are, and their factors.
template <int columns>
struct Cursor {
  const uint8_t* w[columns];
  const float* scales[columns];
  const float* biases[columns];
};

// Hands take() one chunk of 64 of every column, sixteen k at a time.
template <int bits, int second, int columns, typename Take>
PYENGINE_INLINE void unpack_chunk(const Cursor<columns>& at, const Take& take) {
  PYENGINE_UNROLL
  for (int j = 0; j < 4; ++j) {
    F32x16 weights[columns];
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      weights[c] =
          fma(unpack<bits>(at.w[c], j),
              spread<bits, second>(at.scales[c], j),
              spread<bits, second>(at.biases[c], j));
      pin(weights[c]);
    }
    take(weights);
  }
}

// The same for all of weights [k, k + count) of some columns. Prefetches what
// lies `ahead` weights further on.
template <int bits, int second, int columns, typename Take>
PYENGINE_INLINE void unpack_columns(
    const QuantizedMatmulArgs& args,
    const Factors& factors,
    const int (&n)[columns],
    int k,
    int count,
    int64_t ahead,
    const Take& take) {
  constexpr int chunk_bytes = chunk * bits / 8;
  Cursor<columns> at;
  PYENGINE_UNROLL
  for (int c = 0; c < columns; ++c) {
    int64_t factor = (n[c] - factors.first) * int64_t(args.K / args.group_size);
    factor += k / args.group_size;
    at.w[c] = args.w + (n[c] * int64_t(args.K) + k) * bits / 8;
    at.scales[c] = factors.scales + factor;
    at.biases[c] = factors.biases + factor;
  }
  ahead = ahead * bits / 8;
  int done = 0;
  for (; done + chunk <= count; done += chunk) {
    unpack_chunk<bits, second>(at, take);
    // Groups of 128 move on with every second chunk.
    int step = args.group_size == 128 ? done / chunk % 2 : 1 + second;
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      prefetch(at.w[c] + ahead);
      at.w[c] += chunk_bytes;
      at.scales[c] += step;
      at.biases[c] += step;
    }
  }
  if (done < count) {
    // Half a chunk, one group of 32, is left: x is padded with zeros already.
    uint8_t padded[columns][chunk_bytes] = {};
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      memcpy(padded[c], at.w[c], chunk_bytes / 2);
      at.w[c] = padded[c];
    }
    unpack_chunk<bits, 0>(at, take);
  }
}

// All rows of `columns` columns from n on. At the end of the group the last
// column is computed again in place of those that are missing.
template <int bits, int second, int rows, int columns>
void multiply_tile(
    const QuantizedMatmulArgs& args,
    const Group& group,
    const Factors& factors,
    int n) {
  int column[columns];
  PYENGINE_UNROLL
  for (int c = 0; c < columns; ++c) {
    column[c] = n + c < group.end ? n + c : group.end - 1;
  }
  // The next tile's weights arrive while this one is worked on: its columns are
  // short streams, which the machine would notice too late.
  bool more = n + 2 * columns <= group.end;
  int64_t ahead = more ? columns * int64_t(args.K) : 0;
  const float* x = args.x;
  F32x16 acc[rows * columns] = {};
  unpack_columns<bits, second>(
      args,
      factors,
      column,
      0,
      args.K,
      ahead,
      [&](const F32x16(&weights)[columns]) {
        multiply_step<rows, columns>(weights, x, acc);
        x += lanes * rows;
      });

  float results[rows * columns];
  sums(acc, results);
  float* to = group.sums - group.begin;
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    PYENGINE_UNROLL
    for (int c = 0; c < columns; ++c) {
      to[r * (group.end - group.begin) + column[c]] = results[r * columns + c];
    }
  }
}

// Tiles' factors are converted together until they are some cache lines: not
// those of all columns before the first weight is asked for.
constexpr int factors_together = 128;

template <int bits, int second>
void multiply(const QuantizedMatmulArgs& args, const Group& group) {
  if (args.M > tile_rows) {
    Factors factors =
        convert_factors(args, group.begin, group.end, group.factors);
    return multiply_blocks(
        args.M,
        args.K,
        args.x,
        group.begin,
        group.end,
        group.sums,
        [&](auto&&... block) {
          unpack_columns<bits, second>(args, factors, block...);
        });
  }
  int per_column = args.K / args.group_size;
  Factors factors;
  int known = group.begin; // columns before it have theirs
  for_tiles(args.M, group.begin, group.end, [&](auto tile, int n) {
    if (n == known) {
      int per_tile = per_column * tile.columns;
      int ahead = per_tile < factors_together
          ? factors_together / (per_tile + 1) * tile.columns
          : tile.columns;
      auto after = [&](int n) {
        return n + ahead < group.end ? n + ahead : group.end;
      };
      known = after(n);
      factors = convert_factors(args, n, known, group.factors);
      prefetch_factors(args, known, after(known));
    }
    multiply_tile<bits, second, tile.rows, tile.columns>(
        args, group, factors, n);
  });
}

// As groups of 32 or larger ones.
template <int bits>
void multiply_groups(const QuantizedMatmulArgs& args, const Group& group) {
  if (args.group_size == 32) {
    multiply<bits, 1>(args, group);
  } else {
    multiply<bits, 0>(args, group);
  }
}

#if defined(__AVX512VNNI__)
// Scales and biases of some columns from `first` on, each [groups, 16].
void turn_both(
    const QuantizedMatmulArgs& args,
    int first,
    int columns,
    float* scales,
    float* biases) {
  int groups = args.K / args.group_size;
  int64_t at = int64_t(first) * groups;
  auto* from = static_cast<const BFloat*>(args.scales);
  turn_factors(from + at, columns, groups, scales);
  from = static_cast<const BFloat*>(args.biases);
  turn_factors(from + at, columns, groups, biases);
}
#endif

#if defined(PYENGINE_TILES)
// Columns [begin, end) of all rows of planes to sums [M, end - begin], which
// has room for the factors of 32 columns behind it.
template <int bits>
void multiply_planes(
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* sums) {
  int pitch = end - begin, groups = args.K / args.group_size;
  float* factors = sums + args.M * pitch;
  int64_t w_pitch = int64_t(args.K) * bits / 8;
  PlanesAt x = {
      const_cast<char*>(reinterpret_cast<const char*>(args.x)), args.M};
  // Where columns do not fill the last tile, it takes some of them again.
  int columns = pitch < plane_columns ? pitch : plane_columns;
  TileArgs common = {x, args.K, args.group_size, pitch, w_pitch, columns};
  TileShapes shapes(
      columns,
      args.group_size < chunk_k ? args.group_size : chunk_k,
      x.pitch());
  auto tile = [&](int n, float* scales) {
    n = n + columns < end ? n : end - columns;
    float* biases = scales + lanes * groups;
    turn_both(args, n, columns, scales, biases);
    return TileColumns{args.w + n * w_pitch, scales, biases, sums + n - begin};
  };
  with_constant<max_rows>(args.M, [&](auto rows) {
    constexpr int together = tiles_together(rows.value);
    for (int n = begin; n < end; n += together * plane_columns) {
      if constexpr (together == 2) {
        multiply_tiles<bits, rows.value>(
            common,
            {tile(n, factors),
             tile(n + plane_columns, factors + 2 * lanes * groups)});
      } else {
        multiply_tiles<bits, rows.value>(common, {tile(n, factors)});
      }
    }
  });
  _tile_release();
}
#elif defined(__AVX512VNNI__)
// Columns [begin, end) of all rows of planes to sums [M, end - begin], which
// has room for the factors of 32 columns behind it.
template <int bits, int pieces>
void multiply_dots(
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* sums) {
  int pitch = end - begin, groups = args.K / args.group_size;
  float* factors = sums + args.M * pitch;
  int64_t w_pitch = int64_t(args.K) * bits / 8;
  PlanesAt x = {
      const_cast<char*>(reinterpret_cast<const char*>(args.x)), args.M};
  // Where a matrix ends within a tile, that begins before and meets columns
  // again; one of fewer columns than a tile's is taken column by column.
  bool narrow = args.N < plane_columns;
  int columns = narrow ? 1 : plane_columns;
  DotArgs common = {x, narrow ? 0 : w_pitch, args.K, args.group_size, pitch};
  auto tile = [&](int n, float* factors) {
    int first = n + columns < args.N ? n : args.N - columns;
    float* biases = factors + lanes * groups;
    turn_both(args, first, columns, factors, biases);
    int from = first < begin ? begin - first : 0;
    int to = first + columns < end ? columns : end - first;
    return DotTile{
        args.w + first * w_pitch,
        factors,
        biases,
        sums + first - begin,
        __mmask16((1u << to) - (1u << from))};
  };
  if (args.M > rows_in_registers) {
    for (int n = begin; n < end; n += 2 * columns) {
      int second = n + columns < end ? n + columns : n;
      multiply_more<bits, pieces>(
          common,
          {tile(n, factors), tile(second, factors + 2 * lanes * groups)});
    }
    return;
  }
  with_constant<rows_in_registers>(args.M, [&](auto rows) {
    for (int n = begin; n < end; n += columns) {
      if (in_streams(rows.value, w_pitch)) {
        if constexpr (rows.value <= 2) {
          multiply_few<bits, rows.value, pieces>(common, tile(n, factors));
        }
      } else if constexpr (rows.value > 1) {
        multiply_some<bits, rows.value, pieces>(common, tile(n, factors));
      }
    }
  });
}

template <int bits>
void multiply_planes(
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* sums) {
  if (args.group_size == 32) {
    multiply_dots<bits, 2>(args, begin, end, sums);
  } else {
    multiply_dots<bits, 1>(args, begin, end, sums);
  }
}
#endif

} // namespace

void quantized_matmul_sums(
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* scratch) {
#if defined(__AVX512VNNI__)
  if (takes_planes(args.storage)) {
    switch (args.bits) {
      case 8:
        return multiply_planes<8>(args, begin, end, scratch);
      case 6:
        return multiply_planes<6>(args, begin, end, scratch);
      case 4:
        return multiply_planes<4>(args, begin, end, scratch);
    }
  }
#endif
  Group group = {begin, end, scratch, scratch + args.M * (end - begin)};
  switch (args.bits) {
    case 8:
      multiply_groups<8>(args, group);
      break;
    case 6:
      multiply_groups<6>(args, group);
      break;
    case 4:
      multiply_groups<4>(args, group);
      break;
  }
}

void quantized_matmul_columns(
    const QuantizedMatmulArgs& args,
    int begin,
    int end,
    float* scratch) {
  quantized_matmul_sums(args, begin, end, scratch);
  store_columns(args, begin, end, scratch);
}

} // namespace pyengine::PYENGINE_ISA
