#pragma once
// plane_dots.h: quantised weights times planes (planes.h) by the dot products
// of AVX-512 VNNI (Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 2: VPDPBUSD).
//
// Columns are turned on the way, so that a register holds four weights of each
// of sixteen, and multiplied with four elements of a row at a time: a lane is a
// column, and one scale and one bias serve all lanes of a piece. One row, or
// two, read four columns at a time, as streams; some rows meet sixteen columns
// while these are in registers, more of them 32 that lie turned in the first
// cache.

#include "cpu/planes.h"
#include "cpu/turn.h"

#if defined(__AVX512VNNI__)

namespace pyengine::PYENGINE_ISA {

// Whether rows read columns as streams. A chunk seldom begins where a line of
// the cache does, so two chunks share one; where sixteen columns have their
// lines in the same few places of the cache, it is gone before the second
// comes.
constexpr bool in_streams(int rows, int64_t w_pitch) {
  return rows == 1 || (rows == 2 && w_pitch % 2048 == 0);
}
// Up to so many rows meet weights in registers.
constexpr int rows_in_registers = 4;

// Sixteen columns, and where their results go.
struct DotTile {
  const uint8_t* w;
  const float* scales; // [K / group_size, 16]
  const float* biases;
  float* to; // [rows, pitch]
  __mmask16 wanted; // of the columns
};

// What all tiles have in common, and the rows that they meet.
struct DotArgs {
  PlanesAt x;
  int64_t w_pitch; // bytes of a column
  int K;
  int group_size;
  int pitch; // of results
};

// A piece: a chunk, or the half of it that has a group of its own. `pieces` of
// a chunk is a constant, so that the common case knows where its rows are.
template <int pieces>
struct DotPiece {
  static constexpr int vectors = lanes / pieces; // of four weights a column

  const char* x;
  const float* totals; // [rows]
  const float* units;
  int group;

  PYENGINE_INLINE
  DotPiece(const DotArgs& args, const PlanesAt& at, int chunk, int piece)
      : x(at.x + at.piece() * chunk + at.pitch() * vectors * piece),
        totals(at.sums(chunk) + at.rows * (pieces == 1 ? 2 : piece)),
        units(at.units(chunk)),
        group(
            pieces == 1 ? chunk * chunk_k / args.group_size
                        : chunk * pieces + piece) {}
};

// Elements of a chunk that are there; all of them but for groups of 32.
template <int pieces>
PYENGINE_INLINE int count_of(const DotArgs& args, int k) {
  return pieces == 1 || args.K - k > chunk_k ? chunk_k : args.K - k;
}

// Four bytes in every lane.
PYENGINE_INLINE __m512i four(const char* at) {
  int bytes;
  memcpy(&bytes, at, sizeof(bytes));
  return _mm512_set1_epi32(bytes);
}

// Adds a piece's products to the sums of one row.
PYENGINE_INLINE __m512 add_scaled(
    __m512i high,
    __m512i low,
    float unit,
    float total,
    __m512 scale,
    __m512 bias,
    __m512 sums) {
  __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  __m512 product =
      _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(unit));
  sums = _mm512_fmadd_ps(product, scale, sums);
  return _mm512_fmadd_ps(_mm512_set1_ps(total), bias, sums);
}

// ---- One row, or two

// Number i of every four, in the place of all four.
template <int i>
PYENGINE_INLINE __m512i spread_four(__m512i a) {
  return _mm512_shuffle_epi32(a, _MM_PERM_ENUM(0x55 * i));
}

// A chunk of one row or two. Weights are turned within 128 bits only, so four
// of them that are multiplied together are i of the quarters of a chunk: spread
// (i, plane, row) is what they meet.
template <int rows>
struct SpreadChunk;

template <>
struct SpreadChunk<1> {
  __m512i planes[plane_count];

  PYENGINE_INLINE explicit SpreadChunk(const char* x) {
    const __m512i even = _mm512_setr_epi32(
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512i first = _mm512_loadu_si512(x), last = _mm512_loadu_si512(x + 64);
    planes[0] = _mm512_permutex2var_epi32(first, even, last);
    planes[1] = _mm512_permutex2var_epi32(first, odd, last);
  }

  template <int i, int plane, int row>
  PYENGINE_INLINE __m512i spread() const {
    return spread_four<i>(planes[plane]);
  }
};

template <>
struct SpreadChunk<2> {
  __m512i fours[4]; // of both rows' both planes, quarter by quarter

  PYENGINE_INLINE explicit SpreadChunk(const char* x) {
    __m512i quarters[4];
    PYENGINE_UNROLL
    for (int q = 0; q < 4; ++q) {
      quarters[q] = _mm512_loadu_si512(x + 64 * q);
    }
    __m512i a = _mm512_shuffle_i32x4(quarters[0], quarters[1], 0x44);
    __m512i b = _mm512_shuffle_i32x4(quarters[2], quarters[3], 0x44);
    __m512i c = _mm512_shuffle_i32x4(quarters[0], quarters[1], 0xee);
    __m512i d = _mm512_shuffle_i32x4(quarters[2], quarters[3], 0xee);
    fours[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    fours[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    fours[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    fours[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }

  template <int i, int plane, int row>
  PYENGINE_INLINE __m512i spread() const {
    return spread_four<2 * plane + row>(fours[i]);
  }
};

// Four columns: a lane is a column and a quarter of a chunk; the quarters are
// added together in the end.
template <int bits, int rows, int pieces>
PYENGINE_INLINE void multiply_four(
    const DotArgs& args,
    const DotTile& tile,
    int n,
    __m128 (&sums)[rows]) {
  const PlanesAt at = {args.x.x, rows};
  const uint8_t* from = tile.w + n * args.w_pitch;
  for (int k = 0; k < args.K; k += chunk_k) {
    int count = count_of<pieces>(args, k), chunk = k / chunk_k;
    __m512i w[4];
    PYENGINE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const uint8_t* column = from + c * args.w_pitch + int64_t(k) * bits / 8;
      prefetch(column + 4 * args.w_pitch);
      w[c] = unpack_bytes<bits>(column, count);
    }
    turn_four(w);
    SpreadChunk<rows> x(at.x + at.piece() * chunk);
    auto multiply = [&]<int r>(Constant<r>) {
      __m512i high = {}, low = {};
      auto four = [&]<int i>(Constant<i>) {
        high = _mm512_dpbusd_epi32(high, w[i], x.template spread<i, 0, r>());
        low = _mm512_dpbusd_epi32(low, w[i], x.template spread<i, 1, r>());
      };
      four(Constant<0>{});
      four(Constant<1>{});
      four(Constant<2>{});
      four(Constant<3>{});
      __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
      __m256i halves = _mm256_add_epi32(
          _mm512_castsi512_si256(_mm512_shuffle_i32x4(whole, whole, 0x88)),
          _mm512_castsi512_si256(_mm512_shuffle_i32x4(whole, whole, 0xdd)));
      __m128i lower = _mm256_castsi256_si128(halves);
      __m128i upper = _mm256_extracti128_si256(halves, 1);
      auto add = [&](int piece, __m128i whole) {
        DotPiece<pieces> its(args, at, chunk, piece);
        const float* scales = tile.scales + lanes * its.group + n;
        const float* biases = tile.biases + lanes * its.group + n;
        __m128 product =
            _mm_mul_ps(_mm_cvtepi32_ps(whole), _mm_set1_ps(its.units[r]));
        sums[r] = _mm_fmadd_ps(product, _mm_loadu_ps(scales), sums[r]);
        sums[r] = _mm_fmadd_ps(
            _mm_set1_ps(its.totals[r]), _mm_loadu_ps(biases), sums[r]);
      };
      if constexpr (pieces == 1) {
        add(0, _mm_add_epi32(lower, upper));
      } else {
        add(0, lower);
        if (count == chunk_k) {
          add(1, upper);
        }
      }
    };
    multiply(Constant<0>{});
    if constexpr (rows == 2) {
      multiply(Constant<1>{});
    }
  }
}

template <int bits, int rows, int pieces>
void multiply_few(const DotArgs& args, const DotTile& tile) {
  for (int n = 0; n < plane_columns; n += 4) {
    __mmask8 wanted = __mmask8(tile.wanted >> n & 0xf);
    if (wanted != 0) {
      __m128 sums[rows] = {};
      multiply_four<bits, rows, pieces>(args, tile, n, sums);
      PYENGINE_UNROLL
      for (int r = 0; r < rows; ++r) {
        _mm_mask_storeu_ps(tile.to + r * args.pitch + n, wanted, sums[r]);
      }
    }
  }
}

// ---- Some rows

template <int bits, int rows, int pieces>
void multiply_some(const DotArgs& args, const DotTile& tile) {
  const PlanesAt at = {args.x.x, rows};
  __m512 sums[rows] = {};
  for (int k = 0; k < args.K; k += chunk_k) {
    int count = count_of<pieces>(args, k);
    __m512i turned[lanes];
    turn_chunk<bits>(
        tile.w + int64_t(k) * bits / 8,
        args.w_pitch,
        count,
        plane_columns * args.w_pitch,
        turned);
    PYENGINE_UNROLL
    for (int piece = 0; piece < pieces; ++piece) {
      if (piece > 0 && count < chunk_k) {
        break;
      }
      DotPiece<pieces> its(args, at, k / chunk_k, piece);
      __m512i high[rows] = {}, low[rows] = {};
      PYENGINE_UNROLL
      for (int i = 0; i < its.vectors; ++i) {
        __m512i w = turned[its.vectors * piece + i];
        PYENGINE_UNROLL
        for (int r = 0; r < rows; ++r) {
          const char* x = its.x + at.pitch() * i + 4 * r;
          high[r] = _mm512_dpbusd_epi32(high[r], w, four(x));
          low[r] = _mm512_dpbusd_epi32(low[r], w, four(x + at.plane()));
        }
      }
      __m512 scale = _mm512_loadu_ps(tile.scales + lanes * its.group);
      __m512 bias = _mm512_loadu_ps(tile.biases + lanes * its.group);
      PYENGINE_UNROLL
      for (int r = 0; r < rows; ++r) {
        sums[r] = add_scaled(
            high[r], low[r], its.units[r], its.totals[r], scale, bias, sums[r]);
      }
    }
  }
  PYENGINE_UNROLL
  for (int r = 0; r < rows; ++r) {
    _mm512_mask_storeu_ps(tile.to + r * args.pitch, tile.wanted, sums[r]);
  }
}

// ---- More rows

// So many of them have sums of both tiles in registers, and a piece goes by.
constexpr int rows_at_once = 5;
// From one chunk of a column to the weights that are asked for: the columns of
// two tiles are more streams than the machine follows.
constexpr int64_t bytes_ahead = 256;

// Rows [row, row + rows) meet a piece of two tiles.
template <int rows, int pieces>
PYENGINE_INLINE void multiply_piece(
    const DotArgs& args,
    const DotTile (&tiles)[2],
    const __m512i (&turned)[2][lanes],
    const DotPiece<pieces>& its,
    int piece,
    int row,
    float* sums) { // [rows of all, 32]
  __m512i high[2][rows] = {}, low[2][rows] = {};
  const char* x = its.x + 4 * row;
  const int64_t plane = args.x.plane(), pitch = args.x.pitch();
  const int begin = its.vectors * piece, end = begin + its.vectors;
  for (int i = begin; i < end; i += 4) {
    PYENGINE_UNROLL
    for (int j = 0; j < 4; ++j) {
      __m512i first = turned[0][i + j], second = turned[1][i + j];
      PYENGINE_UNROLL
      for (int r = 0; r < rows; ++r) {
        __m512i above = four(x + 4 * r), below = four(x + plane + 4 * r);
        high[0][r] = _mm512_dpbusd_epi32(high[0][r], first, above);
        high[1][r] = _mm512_dpbusd_epi32(high[1][r], second, above);
        low[0][r] = _mm512_dpbusd_epi32(low[0][r], first, below);
        low[1][r] = _mm512_dpbusd_epi32(low[1][r], second, below);
      }
      x += pitch;
    }
  }
  PYENGINE_UNROLL
  for (int c = 0; c < 2; ++c) {
    __m512 scale = _mm512_loadu_ps(tiles[c].scales + lanes * its.group);
    __m512 bias = _mm512_loadu_ps(tiles[c].biases + lanes * its.group);
    PYENGINE_UNROLL
    for (int r = 0; r < rows; ++r) {
      float* sum = sums + lanes * (2 * (row + r) + c);
      __m512 added = add_scaled(
          high[c][r],
          low[c][r],
          its.units[row + r],
          its.totals[row + r],
          scale,
          bias,
          _mm512_load_ps(sum));
      _mm512_store_ps(sum, added);
    }
  }
}

template <int bits, int pieces>
void multiply_more(const DotArgs& args, const DotTile (&tiles)[2]) {
  const int M = args.x.rows;
  const int blocks = (M + rows_at_once - 1) / rows_at_once;
  alignas(64) float sums[max_rows * 2 * lanes];
  memset(sums, 0, M * 2 * lanes * sizeof(float));
  alignas(64) __m512i turned[2][2][lanes]; // this chunk and the next by turns
  auto turn = [&](int k, int tile) {
    int64_t at = int64_t(k) * bits / 8, ahead = bytes_ahead;
    if (at + ahead >= args.w_pitch) { // where the next tiles begin
      ahead += (2 * plane_columns - 1) * args.w_pitch;
    }
    turn_chunk<bits>(
        tiles[tile].w + at,
        args.w_pitch,
        count_of<pieces>(args, k),
        ahead,
        turned[k / chunk_k % 2][tile]);
  };
  if (args.K > 0) {
    turn(0, 0);
    turn(0, 1);
  }
  for (int k = 0; k < args.K; k += chunk_k) {
    int chunk = k / chunk_k, next = k + chunk_k;
    int tile = next < args.K ? 0 : 2; // of the next chunk, to be turned
    for (int piece = 0; piece < pieces; ++piece) {
      if (piece > 0 && count_of<pieces>(args, k) < chunk_k) {
        break;
      }
      DotPiece<pieces> its(args, args.x, chunk, piece);
      for (int block = 0, row = 0; block < blocks; ++block) {
        int rows = (M - row + blocks - block - 1) / (blocks - block);
        with_constant<rows_at_once>(rows, [&](auto some) {
          multiply_piece<some.value, pieces>(
              args, tiles, turned[chunk % 2], its, piece, row, sums);
        });
        row += rows;
        // Shuffles between multiplications, which leave their port free.
        if (tile < 2) {
          turn(next, tile++);
        }
      }
    }
    for (; tile < 2; ++tile) {
      turn(next, tile);
    }
  }
  for (int c = 0; c < 2; ++c) {
    for (int r = 0; r < M; ++r) {
      _mm512_mask_storeu_ps(
          tiles[c].to + r * args.pitch,
          tiles[c].wanted,
          _mm512_load_ps(sums + lanes * (2 * r + c)));
    }
  }
}

} // namespace pyengine::PYENGINE_ISA

#endif
