#pragma once
// planes.h: quantised weights times rows of 16-bit floats, in whole numbers on
// the tiles of AMX (Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 2: TDPBUSD).
//
// A row of x becomes whole numbers of 22 bits and a sign, fixed point under its
// largest magnitude, cut into three planes of signed bytes. A tile instruction
// multiplies 64 bytes of sixteen columns, which lie in memory as they are, with
// one plane of all rows, and adds without rounding. A group's scale and bias
// come to its sum in float32, group after group in ascending order: the number
// of rows cannot change a row's bits.
//
// What is rounded is x alone: an element loses what lies below 2^-22 of its
// row's largest magnitude. A bfloat16, which has 8 bits, stays what it is down
// to 2^-14 of that magnitude, a float16 with its 11 down to 2^-11; below, the
// error is no larger than a float32 sum makes that holds the largest element.

#include "cpu/simd.h"

#if defined(PYENGINE_EMULATE_TILES)
#include "cpu/emulated_tiles.h"
#endif

#if defined(PYENGINE_TILES)

namespace pyengine::PYENGINE_ISA {

// float32 has bits that planes would drop.
constexpr bool takes_planes(Storage storage) {
  return storage != Storage::float32;
}

constexpr int plane_count = 3;
constexpr int plane_bits = 22; // of a magnitude
constexpr int tile_k = 64; // elements that a tile holds of each row
constexpr int tile_n = 16; // columns

// All planes of one, two or four rows lie side by side in one tile, [16, 3,
// rows, 4] bytes, so that one instruction does the work of three. Those of
// other numbers of rows have a tile each, [3, 16, rows, 4].
constexpr bool share_tile(int rows) {
  return rows == 1 || rows == 2 || rows == 4;
}

// Scratch of `rows` rows: for every tile_k elements 256 bytes per row. There
// are the planes, highest first; the sums of the first and of the second half,
// [2, rows] int32; and in the first of these pieces what one unit of each row's
// whole numbers is worth, [rows] float32.
struct PlanesAt {
  char* x;
  int rows;

  int64_t piece() const { // from one to the next
    return int64_t(256) * rows;
  }
  int plane() const {
    return share_tile(rows) ? 4 * rows : 64 * rows;
  }
  int pitch() const { // from four elements of a row to the next four
    return share_tile(rows) ? 4 * plane_count * rows : 4 * rows;
  }
  int32_t* halves(int index) const {
    return reinterpret_cast<int32_t*>(x + piece() * index + 192 * rows);
  }
  float* units() const {
    return reinterpret_cast<float*>(halves(0) + 2 * rows);
  }
};

// One row on its way to its planes: measure() it, scale(), then put() it.
class Planes {
 public:
  Planes(float* x, int rows, int row)
      : at_{reinterpret_cast<char*>(x), rows},
        row_(row) {}

  PYENGINE_INLINE void measure(F32x16 a) {
    __m512i bits = _mm512_castps_si512(a.part[0]);
    __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    largest_ = _mm512_max_epi32(largest_, magnitude);
  }

  // Of a row that holds an infinity or NaN every result is NaN. One whose
  // largest element is below 2^-105 is scaled as if that were larger.
  PYENGINE_INLINE void scale() {
    int exponent = _mm512_reduce_max_epi32(largest_) >> 23;
    bool finite = exponent < 255;
    exponent = exponent < plane_bits ? plane_bits : exponent;
    factor_ = finite ? power(254 + plane_bits - 1 - exponent) : 0.0f;
    at_.units()[row_] =
        finite ? power(exponent - plane_bits + 1) : __builtin_nanf("");
  }

  PYENGINE_INLINE void put(F32x16 a) {
    __m512i left = _mm512_cvtps_epi32((a * broadcast(factor_)).part[0]);
    __m512i low = signed_byte(left);
    __m512i middle = _mm512_srai_epi32(_mm512_sub_epi32(left, low), 8);
    __m512i high = middle;
    middle = signed_byte(middle);
    high = _mm512_srai_epi32(_mm512_sub_epi32(high, middle), 8);
    int piece = place_ / 4, part = place_ % 4;
    char* at = at_.x + at_.piece() * piece + 4 * part * at_.pitch() + 4 * row_;
    put_bytes(at, high);
    put_bytes(at + at_.plane(), middle);
    put_bytes(at + 2 * at_.plane(), low);
    half_ = part % 2 ? _mm512_add_epi32(half_, left) : left;
    if (part % 2) {
      int32_t* halves = at_.halves(piece) + at_.rows * (part / 2);
      halves[row_] = _mm512_reduce_add_epi32(half_);
    }
    ++place_;
  }

 private:
  // 2 to the power of exponent - 127.
  static float power(int exponent) {
    int32_t bits = exponent << 23;
    float r;
    memcpy(&r, &bits, sizeof(r));
    return r;
  }

  static PYENGINE_INLINE __m512i signed_byte(__m512i a) {
    return _mm512_srai_epi32(_mm512_slli_epi32(a, 24), 24);
  }

  // Sixteen elements, four by four beside those of the other rows.
  PYENGINE_INLINE void put_bytes(char* to, __m512i a) const {
    __m128i bytes = _mm512_cvtepi32_epi8(a);
    int fours[4];
    memcpy(fours, &bytes, sizeof(fours));
    PYENGINE_UNROLL
    for (int i = 0; i < 4; ++i) {
      memcpy(to + i * at_.pitch(), &fours[i], 4);
    }
  }

  PlanesAt at_;
  int row_;
  int place_ = 0;
  float factor_ = 0;
  __m512i largest_ = _mm512_setzero_si512();
  __m512i half_ = _mm512_setzero_si512();
};

// ---- The product

// Where the sixteen results of vector v of [tile_n, rows] belong.
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

// Where sixteen sums of one plane lie among 48 [tile_n, 3, rows]: in the first
// two vectors, or they are taken from there as they are, and in the third.
template <int rows>
struct SharedPlaces {
  alignas(64) int32_t first[plane_count][lanes];
  alignas(64) int32_t rest[plane_count][lanes];

  constexpr SharedPlaces() : first(), rest() {
    for (int plane = 0; plane < plane_count; ++plane) {
      for (int i = 0; i < lanes; ++i) {
        int at = (i / rows * plane_count + plane) * rows + i % rows;
        first[plane][i] = at < 2 * lanes ? at : 0;
        rest[plane][i] = at < 2 * lanes ? i : at - lanes;
      }
    }
  }
};

// What tile instructions read was written before, and what they wrote is read
// after: gcc's own intrinsics do not say so.
PYENGINE_INLINE void memory_barrier(const void* address) {
  __asm__ __volatile__("" ::"r"(address) : "memory");
}

// The shapes of tiles, as the machine reads them. Tiles 0 to 2 and 3 to 5 hold
// sums, 6 weights and 7 x.
class TileShapes {
 public:
  TileShapes(int columns, int k, int row_bytes) {
    for (int i = 0; i < 6; ++i) {
      set(i, columns, row_bytes);
    }
    set(6, columns, k);
    set(7, k / 4, row_bytes);
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
// numbers of tiles are part of the instructions.
template <int set>
PYENGINE_INLINE void clear_sums() {
  if constexpr (set == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  } else {
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
}

// Adds the product of the weights in tile 6 with x to a set.
template <int set, bool shared>
PYENGINE_INLINE void add_products(const char* x, int64_t plane, int64_t pitch) {
  _tile_loadd(7, x, pitch);
  if constexpr (set == 0) {
    _tile_dpbusd(0, 6, 7);
  } else {
    _tile_dpbusd(3, 6, 7);
  }
  if constexpr (!shared) {
    _tile_loadd(7, x + plane, pitch);
    if constexpr (set == 0) {
      _tile_dpbusd(1, 6, 7);
    } else {
      _tile_dpbusd(4, 6, 7);
    }
    _tile_loadd(7, x + 2 * plane, pitch);
    if constexpr (set == 0) {
      _tile_dpbusd(2, 6, 7);
    } else {
      _tile_dpbusd(5, 6, 7);
    }
  }
}

// Stores a set to products [3, tile_n, rows], or [tile_n, 3, rows] if shared.
template <int set, bool shared>
PYENGINE_INLINE void store_sums(int32_t* products, int64_t pitch) {
  constexpr int plane = tile_n * lanes;
  if constexpr (set == 0) {
    _tile_stored(0, products, pitch);
    if constexpr (!shared) {
      _tile_stored(1, products + plane, pitch);
      _tile_stored(2, products + 2 * plane, pitch);
    }
  } else {
    _tile_stored(3, products, pitch);
    if constexpr (!shared) {
      _tile_stored(4, products + plane, pitch);
      _tile_stored(5, products + 2 * plane, pitch);
    }
  }
  memory_barrier(products);
}

// 64 weights of four or six bits, or 32, as bytes in the order of x (load_row).
template <int bits>
PYENGINE_INLINE void unpack_bytes(const uint8_t* from, int count, uint8_t* to) {
  __mmask64 there = ~0ull >> (64 - count * bits / 8);
  __m512i packed = _mm512_maskz_loadu_epi8(there, from);
  __m512i bytes;
  if constexpr (bits == 4) {
    const __m512i twice = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    const __m512i nibble = _mm512_setr_epi64(
        0x3830282018100800,
        0x3830282018100800,
        0x3c342c241c140c04,
        0x3c342c241c140c04,
        0x3830282018100800,
        0x3830282018100800,
        0x3c342c241c140c04,
        0x3c342c241c140c04);
    packed = _mm512_permutexvar_epi64(twice, packed);
    bytes = _mm512_multishift_epi64_epi8(nibble, packed);
    bytes = _mm512_and_si512(bytes, _mm512_set1_epi8(0x0f));
  } else {
    static_assert(bits == 6);
    // Eight weights lie in six bytes.
    const __m512i sixes = _mm512_setr_epi64(
        0x0706050403020100,
        0x0d0c0b0a09080706,
        0x131211100f0e0d0c,
        0x1918171615141312,
        0x1f1e1d1c1b1a1918,
        0x2524232221201f1e,
        0x2b2a292827262524,
        0x31302f2e2d2c2b2a);
    packed = _mm512_permutexvar_epi8(sixes, packed);
    bytes = _mm512_multishift_epi64_epi8(
        _mm512_set1_epi64(0x2a241e18120c0600), packed);
    bytes = _mm512_and_si512(bytes, _mm512_set1_epi8(0x3f));
  }
  _mm512_storeu_si512(to, bytes);
}

// Sixteen rows of sixteen become sixteen columns.
PYENGINE_INLINE void transpose(__m512 (&a)[lanes]) {
  __m512 b[lanes];
  PYENGINE_UNROLL
  for (int i = 0; i < 16; i += 2) { // pairs within 128 bits
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  PYENGINE_UNROLL
  for (int i = 0; i < 16; i += 4) { // fours
    for (int j = 0; j < 2; ++j) {
      __m512d low = _mm512_castps_pd(b[i + j]);
      __m512d high = _mm512_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 i + j] holds column j + 4 q of rows 4 i to 4 i + 3 in quarter q.
  PYENGINE_UNROLL
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44);
    b[4 + j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
    b[8 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44);
    b[12 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
  }
  PYENGINE_UNROLL
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88);
    a[4 + j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd);
    a[8 + j] = _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0x88);
    a[12 + j] = _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0xdd);
  }
}

PYENGINE_INLINE __m512 widen_some(const BFloat* from, __mmask16 some) {
  __m256i bits = _mm256_maskz_loadu_epi16(some, from);
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

PYENGINE_INLINE __m512 widen_some(const Half* from, __mmask16 some) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from));
}

// Scales or biases of `columns` <= 16 columns [columns, groups] to
// [groups, 16]; those of columns that are missing are 0.
template <typename T>
void turn_factors(const T* from, int columns, int groups, float* to) {
  for (int g = 0; g < groups; g += lanes) {
    int count = groups - g < lanes ? groups - g : lanes;
    __mmask16 some = __mmask16(0xffff >> (lanes - count));
    __m512 square[lanes];
    PYENGINE_UNROLL
    for (int n = 0; n < lanes; ++n) {
      square[n] = widen_some(
          from + int64_t(n) * groups + g, n < columns ? some : __mmask16(0));
    }
    transpose(square);
    PYENGINE_UNROLL
    for (int i = 0; i < lanes; ++i) {
      if (i < count) {
        _mm512_storeu_ps(to + (g + i) * lanes, square[i]);
      }
    }
  }
}

// Sixteen sums of one plane, vector v of [tile_n, rows].
template <int rows>
PYENGINE_INLINE __m512i plane_sums(const int32_t* products, int plane, int v) {
  if constexpr (!share_tile(rows)) {
    return _mm512_load_si512(products + tile_n * lanes * plane + lanes * v);
  } else {
    // They lie among 48, four rows of twelve for example.
    static constexpr SharedPlaces<rows> places;
    const int32_t* at = products + 3 * lanes * v;
    __m512i first = _mm512_permutex2var_epi32(
        _mm512_load_si512(at),
        _mm512_load_si512(places.first[plane]),
        _mm512_load_si512(at + lanes));
    return _mm512_permutex2var_epi32(
        first,
        _mm512_load_si512(places.rest[plane]),
        _mm512_load_si512(at + 2 * lanes));
  }
}

// Adds one group to sums [tile_n, rows].
template <int rows>
PYENGINE_INLINE void add_group(
    const int32_t* products,
    const float* scales, // [16]
    const float* biases,
    __m512 total, // of x, in units: [rows]
    __m512 (&sums)[rows]) {
  static constexpr Places<rows> places;
  __m512 scale = _mm512_loadu_ps(scales), bias = _mm512_loadu_ps(biases);
  PYENGINE_UNROLL
  for (int v = 0; v < rows; ++v) {
    __m512 high = _mm512_cvtepi32_ps(plane_sums<rows>(products, 0, v));
    __m512i middle = plane_sums<rows>(products, 1, v);
    __m512i low = plane_sums<rows>(products, 2, v);
    __m512 rest =
        _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(middle, 8), low));
    __m512 units = _mm512_fmadd_ps(high, _mm512_set1_ps(65536.0f), rest);
    __m512 my_scale, my_bias, my_total;
    if constexpr (rows == lanes) {
      my_scale = _mm512_set1_ps(scales[v]);
      my_bias = _mm512_set1_ps(biases[v]);
      my_total = total;
    } else {
      __m512i column = _mm512_load_si512(places.column[v]);
      my_scale = _mm512_permutexvar_ps(column, scale);
      my_bias = _mm512_permutexvar_ps(column, bias);
      my_total = _mm512_permutexvar_ps(_mm512_load_si512(places.row[v]), total);
    }
    sums[v] = _mm512_fmadd_ps(units, my_scale, sums[v]);
    sums[v] = _mm512_fmadd_ps(my_total, my_bias, sums[v]);
  }
}

// Sixteen columns, or what is left of them.
struct TileColumns {
  const uint8_t* w; // of the first
  const float* scales; // [K / group_size, 16]
  const float* biases;
  float* to; // [rows, pitch]
};

// What tiles of columns have in common, and the rows that they meet.
struct TileArgs {
  int64_t w_pitch; // bytes of a column
  int K;
  int group_size;
  PlanesAt x;
  int columns; // of a tile
  int pitch;
};

// Tiles of columns that go through k side by side. A tile's worth of x comes
// from the second cache, and where it is much more than the weights that it
// meets, two tiles of these share the way.
constexpr int tiles_together(int rows) {
  return share_tile(rows) ? 1 : 2;
}

// How far ahead weights are asked for. Short columns end before the machine
// notices that they are streams, so the next tiles' are; of long ones it keeps
// up with few rows' work, and more hides the wait only if it is asked early.
constexpr int64_t bytes_ahead(int64_t w_pitch, int tiles, bool shared) {
  return w_pitch <= 2048 ? tiles * tile_n * w_pitch : shared ? 0 : 512;
}

template <int bits, int rows, int tiles>
void multiply_planes(const TileArgs& args, const TileColumns (&of)[tiles]) {
  constexpr bool shared = share_tile(rows);
  alignas(64) int32_t products[2][plane_count * tile_n * lanes];
  alignas(64) uint8_t unpacked[tile_n * tile_k];
  const unsigned group_size = args.group_size;
  const unsigned step = group_size < tile_k ? group_size : tile_k;
  const unsigned steps = group_size / step;
  const unsigned turns = args.K / group_size * tiles;
  const int64_t x_pitch = args.x.pitch(), x_plane = args.x.plane();
  const int64_t ahead = bytes_ahead(args.w_pitch, tiles, shared);
  const __mmask16 all = __mmask16((1u << rows) - 1);
  __m512 sums[tiles][rows] = {};

  auto multiply = [&]<int set>(Constant<set>, unsigned turn) {
    clear_sums<set>();
    unsigned k = turn / tiles * group_size;
    const uint8_t* w = of[turn % tiles].w + k * bits / 8;
    const char* x = args.x.x + k / tile_k * args.x.piece();
    x += k % tile_k / 4 * x_pitch; // with groups of 32
    for (unsigned s = 0; s < steps; ++s) {
      if (ahead > 0) {
        PYENGINE_UNROLL
        for (int n = 0; n < tile_n; ++n) {
          prefetch(w + n * args.w_pitch + ahead);
        }
      }
      if constexpr (bits == 8) {
        _tile_loadd(6, w, args.w_pitch);
      } else {
        for (int n = 0; n < args.columns; ++n) {
          unpack_bytes<bits>(w + n * args.w_pitch, step, unpacked + tile_k * n);
        }
        memory_barrier(unpacked);
        _tile_loadd(6, unpacked, tile_k);
      }
      add_products<set, shared>(x, x_plane, x_pitch);
      w += step * bits / 8;
      x += args.x.piece();
    }
  };
  auto add = [&](unsigned turn) {
    unsigned g = turn / tiles, tile = turn % tiles;
    __m512i total = _mm512_setzero_si512();
    for (unsigned k = g * group_size; k < (g + 1) * group_size; k += 32) {
      const int32_t* half = args.x.halves(k / tile_k) + k / 32 % 2 * rows;
      total = _mm512_add_epi32(total, _mm512_maskz_loadu_epi32(all, half));
    }
    add_group<rows>(
        products[turn % 2],
        of[tile].scales + lanes * g,
        of[tile].biases + lanes * g,
        _mm512_cvtepi32_ps(total),
        sums[tile]);
  };
  // Tiles make the products of one group while those of the last are stored
  // and those of the last but one added up.
  for (unsigned turn = 0; turn < turns + 2; ++turn) {
    if (turn < turns) {
      turn % 2 ? multiply(Constant<1>{}, turn) : multiply(Constant<0>{}, turn);
    }
    if (turn > 1) {
      add(turn - 2);
    }
    if (turn > 0 && turn <= turns) {
      turn % 2 ? store_sums<0, shared>(products[0], x_pitch)
               : store_sums<1, shared>(products[1], x_pitch);
    }
  }

  static constexpr Places<rows> places;
  __m512 units = _mm512_maskz_loadu_ps(all, args.x.units());
  for (int tile = 0; tile < tiles; ++tile) {
    float results[lanes * rows];
    PYENGINE_UNROLL
    for (int v = 0; v < rows; ++v) {
      __m512i row = _mm512_load_si512(places.row[v]);
      _mm512_storeu_ps(
          results + lanes * v,
          _mm512_mul_ps(sums[tile][v], _mm512_permutexvar_ps(row, units)));
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
