#pragma once
// plane_tiles.h: quantised weights times planes (planes.h) on the tiles of AMX
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2:
// TDPBUSD).
//
// A tile instruction multiplies a piece of sixteen columns, whose bytes lie in
// memory as they are, with one plane of all rows, or with both where these
// share a tile.

#include "cpu/planes.h"
#include "cpu/turn.h"

#if defined(PYENGINE_EMULATE_TILES)
#include "cpu/emulated_tiles.h"
#endif

#if defined(PYENGINE_TILES)

namespace pyengine::PYENGINE_ISA {

// Where the sixteen results of vector v of [plane_columns, rows] belong.
template <int rows>
struct Places {
  alignas(64) int32_t column[rows][lanes];
  alignas(64) int32_t row[rows][lanes];

  constexpr Places() : column(), row() {
    for (int i = 0; i < rows * lanes; ++i) {
      column[i / lanes][i % lanes] = i / rows;
      row[i / lanes][i % lanes] = i % rows;
    }
  }
};

// Where sixteen sums of one plane lie among 32 [plane_columns, 2, rows].
template <int rows>
struct SharedPlaces {
  alignas(64) int32_t at[plane_count][lanes];

  constexpr SharedPlaces() : at() {
    for (int plane = 0; plane < plane_count; ++plane) {
      for (int i = 0; i < lanes; ++i) {
        at[plane][i] = (i / rows * plane_count + plane) * rows + i % rows;
      }
    }
  }
};

// What tile instructions read was written before, and what they wrote is read
// after: gcc's own intrinsics do not say so.
PYENGINE_INLINE void memory_barrier(const void* address) {
  __asm__ __volatile__("" ::"r"(address) : "memory");
}

// The shapes of tiles, as the machine reads them. Tiles 0 to 1 and 2 to 3 hold
// sums, 4 weights and 5 and 6 the planes of x, or 5 both.
class TileShapes {
 public:
  TileShapes(int columns, int k, int row_bytes) {
    for (int i = 0; i < 4; ++i) {
      set(i, columns, row_bytes);
    }
    set(4, columns, k);
    set(5, k / 4, row_bytes);
    set(6, k / 4, row_bytes);
    memory_barrier(this);
    _tile_loadconfig(this);
  }

 private:
  void set(int tile, int height, int row_bytes) {
    height_[tile] = uint8_t(height);
    row_bytes_[tile] = uint16_t(row_bytes);
  }

  uint8_t palette_ = 1;
  uint8_t start_row_ = 0;
  uint8_t reserved_[14] = {};
  uint16_t row_bytes_[16] = {};
  uint8_t height_[16] = {};
};

// Two sets of sums take turns: one is added up while the other is stored. The
// numbers of tiles are part of the instructions. The weights are in tile 4.
template <int set, bool shared>
PYENGINE_INLINE void
multiply_tile_by(const char* x, int64_t plane, int64_t pitch) {
  _tile_loadd(5, x, pitch);
  if constexpr (set == 0) {
    _tile_zero(0);
    _tile_dpbusd(0, 4, 5);
  } else {
    _tile_zero(2);
    _tile_dpbusd(2, 4, 5);
  }
  if constexpr (!shared) {
    _tile_loadd(6, x + plane, pitch);
    if constexpr (set == 0) {
      _tile_zero(1);
      _tile_dpbusd(1, 4, 6);
    } else {
      _tile_zero(3);
      _tile_dpbusd(3, 4, 6);
    }
  }
}

// Stores a set to products [2, plane_columns, rows], or [plane_columns, 2,
// rows] if shared.
template <int set, bool shared>
PYENGINE_INLINE void store_sums(int32_t* products, int64_t pitch) {
  constexpr int plane = plane_columns * lanes;
  if constexpr (set == 0) {
    _tile_stored(0, products, pitch);
    if constexpr (!shared) {
      _tile_stored(1, products + plane, pitch);
    }
  } else {
    _tile_stored(2, products, pitch);
    if constexpr (!shared) {
      _tile_stored(3, products + plane, pitch);
    }
  }
  memory_barrier(products);
}

// Sixteen sums of one plane, vector v of [plane_columns, rows].
template <int rows>
PYENGINE_INLINE __m512i plane_sums(const int32_t* products, int plane, int v) {
  if constexpr (!planes_share(rows)) {
    const int32_t* at = products + plane_columns * lanes * plane;
    return _mm512_load_si512(at + lanes * v);
  } else {
    static constexpr SharedPlaces<rows> places;
    const int32_t* at = products + plane_count * lanes * v;
    return _mm512_permutex2var_epi32(
        _mm512_load_si512(at),
        _mm512_load_si512(places.at[plane]),
        _mm512_load_si512(at + lanes));
  }
}

// Adds one piece to sums [plane_columns, rows].
template <int rows>
PYENGINE_INLINE void add_piece(
    const int32_t* products,
    const float* scales, // [plane_columns]
    const float* biases,
    const float* units, // [rows]
    const float* totals,
    __m512 (&sums)[rows]) {
  static constexpr Places<rows> places;
  constexpr auto all = __mmask16((1u << rows) - 1);
  __m512 scale = _mm512_loadu_ps(scales), bias = _mm512_loadu_ps(biases);
  __m512 unit = _mm512_maskz_loadu_ps(all, units);
  __m512 total = _mm512_maskz_loadu_ps(all, totals);
  PYENGINE_UNROLL
  for (int v = 0; v < rows; ++v) {
    __m512i high = plane_sums<rows>(products, 0, v);
    __m512i low = plane_sums<rows>(products, 1, v);
    __m512 whole =
        _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    __m512 my_scale, my_bias, my_unit = unit, my_total = total;
    if constexpr (rows == lanes) {
      my_scale = _mm512_set1_ps(scales[v]);
      my_bias = _mm512_set1_ps(biases[v]);
    } else {
      __m512i column = _mm512_load_si512(places.column[v]);
      __m512i row = _mm512_load_si512(places.row[v]);
      my_scale = _mm512_permutexvar_ps(column, scale);
      my_bias = _mm512_permutexvar_ps(column, bias);
      my_unit = _mm512_permutexvar_ps(row, unit);
      my_total = _mm512_permutexvar_ps(row, total);
    }
    __m512 product = _mm512_mul_ps(whole, my_unit);
    sums[v] = _mm512_fmadd_ps(product, my_scale, sums[v]);
    sums[v] = _mm512_fmadd_ps(my_total, my_bias, sums[v]);
  }
}

// Sixteen columns, or what is left of them.
struct TileColumns {
  const uint8_t* w; // of the first
  const float* scales; // [K / group_size, plane_columns]
  const float* biases;
  float* to; // [rows, pitch]
};

// What tiles of columns have in common, and the rows that they meet.
struct TileArgs {
  PlanesAt x;
  int K;
  int group_size;
  int pitch; // of results
  int64_t w_pitch; // bytes
  int columns; // of a tile
};

// Tiles of columns that go through k side by side. A tile's worth of x comes
// from the second cache, and where it is more than the weights that it meets,
// two tiles of these share the way.
constexpr int tiles_together(int rows) {
  return planes_share(rows) ? 1 : 2;
}

// How far ahead weights are asked for. Short columns end before the machine
// notices that they are streams, so the next tiles' are; of long ones it keeps
// up with few rows' work, and more hides the wait only if it is asked early.
constexpr int64_t tile_bytes_ahead(int64_t w_pitch, int tiles, bool shared) {
  return w_pitch <= 2048 ? tiles * plane_columns * w_pitch : shared ? 0 : 512;
}

template <int bits, int rows, int tiles>
void multiply_tiles(const TileArgs& args, const TileColumns (&of)[tiles]) {
  constexpr bool shared = planes_share(rows);
  alignas(64) int32_t products[2][plane_count * plane_columns * lanes];
  alignas(64) uint8_t unpacked[plane_columns * chunk_k];
  const PlanesAt at = {args.x.x, rows};
  const unsigned group_size = args.group_size;
  const unsigned width = group_size < chunk_k ? group_size : chunk_k;
  const unsigned halves = chunk_k / width; // pieces of a chunk
  const unsigned turns = args.K / width * tiles;
  const int64_t ahead = tile_bytes_ahead(args.w_pitch, tiles, shared);
  __m512 sums[tiles][rows] = {};

  auto multiply = [&]<int set>(Constant<set>, unsigned turn) {
    unsigned piece = turn / tiles;
    const uint8_t* w = of[turn % tiles].w + piece * width * bits / 8;
    const char* x = at.x + at.piece() * (piece / halves);
    x += piece % halves * (width / 4) * at.pitch();
    if (ahead > 0) {
      PYENGINE_UNROLL
      for (int n = 0; n < plane_columns; ++n) {
        prefetch(w + n * args.w_pitch + ahead);
      }
    }
    if constexpr (bits == 8) {
      _tile_loadd(4, w, args.w_pitch);
    } else {
      for (int n = 0; n < args.columns; ++n) {
        _mm512_store_si512(
            unpacked + chunk_k * n,
            unpack_bytes<bits>(w + n * args.w_pitch, width));
      }
      memory_barrier(unpacked);
      _tile_loadd(4, unpacked, chunk_k);
    }
    multiply_tile_by<set, shared>(x, at.plane(), at.pitch());
  };
  auto add = [&](unsigned turn) {
    unsigned piece = turn / tiles, tile = turn % tiles;
    unsigned chunk = piece / halves, group = piece * width / group_size;
    add_piece<rows>(
        products[turn % 2],
        of[tile].scales + lanes * group,
        of[tile].biases + lanes * group,
        at.units(chunk),
        at.sums(chunk) + rows * (halves == 1 ? 2 : piece % halves),
        sums[tile]);
  };
  // Tiles make the products of one piece while those of the last are stored
  // and those of the last but one added up.
  for (unsigned turn = 0; turn < turns + 2; ++turn) {
    if (turn < turns) {
      turn % 2 ? multiply(Constant<1>{}, turn) : multiply(Constant<0>{}, turn);
    }
    if (turn > 1) {
      add(turn - 2);
    }
    if (turn > 0 && turn <= turns) {
      turn % 2 ? store_sums<0, shared>(products[0], at.pitch())
               : store_sums<1, shared>(products[1], at.pitch());
    }
  }

  for (int tile = 0; tile < tiles; ++tile) {
    float results[lanes * rows];
    PYENGINE_UNROLL
    for (int v = 0; v < rows; ++v) {
      _mm512_storeu_ps(results + lanes * v, sums[tile][v]);
    }
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < args.columns; ++n) {
        of[tile].to[m * args.pitch + n] = results[n * rows + m];
      }
    }
  }
}

} // namespace pyengine::PYENGINE_ISA

#endif
