// block_attention: softmax(scale * q @ k.T + mask) @ v for the rows of several
// pieces against the pages of each one's sequence, in three launches for all.
// Their threadgroups are of items, which are up to 16 positions of a piece:
//
// * scores: q @ k.T. A threadgroup takes a page of a head (half a page for more
//   than 16 rows) and up to 64 rows, which are the positions times the H / K
//   query heads that share the keys.
// * values: the softmax of each span of 512 positions, and its sums of values.
//   A threadgroup takes a span, 128 columns of v and the same rows.
// * fold: the spans of a row, one after the other, and the division.
//
// So each visible key and value is read once for up to 64 rows (8 positions of
// 8 heads), and once more for every 64 rows beyond; a hidden one never. The
// traffic of the temporaries is 4 bytes per score, read once for every 128
// columns, and D + 2 floats per span and row. For D = 512 and bfloat16 that is
// R / 73 of the bytes of keys and values, R the rows: 11 % at T = 1 and eight
// heads, 66 % at T = 6. The temporaries are short-lived and small: R / 256 of
// the bytes of keys and values.
//
// Why three. Scores want 16 partial sums each, values an accumulator for each
// row and column: registers hold one or the other. And a span's values can
// start only when its scores are there, so launches of their own fill the GPU
// from a single key head: a threadgroup a page, then D / 128 for eight pages.
//
// Why these tiles. Figures of a core are those in quantized_matmul.metal.
// * Scores: 4 rows and 4 keys make 64 partial sums of a lane, in all some 104
//   registers: 208 KiB are 16 simdgroups, 64 rows of 32 keys. A quad from
//   threadgroup memory serves 8 fma of four.
// * Such a threadgroup has the core to itself, so a thread asks for the next
//   tile before it works on this one: two loads, whose places it knows from the
//   start. No load of a tile that is seen whole is behind a condition.
// * Values: 32 sums per lane; weights take 2 KiB per simdgroup, v 8 KiB: at 48
//   rows a core has room for three threadgroups. A quad serves 11 fma of four.
// * R rows make R / 2 fma per byte of bfloat16: past 30 rows an M4 Max core,
//   with 15 per byte, is bound by arithmetic, whatever is read.
// * Beside the arithmetic, counted for 48 rows of D = 512 (docs/isa.md): scores
//   take 14.5 instructions per byte that a threadgroup moves, 8.9 of them fma;
//   values 20.2, 13.3 of them fma and 4 of the softmax. A tile of scores is 309
//   instructions for 256 fma, 16 positions of values are 572 for 512.
//
// Chunks of 64, which are pages, and spans of 512 are cut at absolute
// positions, and all sums run in the order of csrc/ops/block_attention_cpu.cpp.
// So the bits are those of the processor, and depend on a row and its visible
// keys alone: not on other rows, N, which pages they are or the grid, which
// follows from shapes while lengths and tables are read here. Where a piece has
// no such positions, or sees more pages than N, nothing is read and it is NaN;
// where a page is none of the P, page 0 is read for it, and the piece is NaN
// too.
//
// Rows of a tree sit at positions of their own, and have own keys from the
// piece's first position on (`tree`): a position's key is in the slot of an
// ancestor. Scores are made of all rows and slots. The softmax takes them by
// position, through the row's line of ancestors, and the values of these few
// positions come straight from memory, for each row its own. So no sum has
// another order than that of a step behind the row's path.
//
// Limits: up to 128 items; D a multiple of 16, at most 512; q, keys and values
// on 16 bytes.
#include "block_attention_params.h"
#include "ordered_sum.h"
#include "positions.h"

namespace pyengine {

constant bool tree [[function_constant(0)]];

typedef BlockAttentionParams Params;
typedef BlockAttentionItem Item;

constant constexpr int chunk = page_size; // positions of one step of a softmax
constant constexpr int span = 512; // positions of one state

// Of scores: a quarter of a simdgroup's 16 sums for each of these in a lane.
constant constexpr ushort lane_rows = 4, lane_keys = 4;
constant constexpr ushort simd_keys = 8 * lane_keys;
constant constexpr ushort tile_bytes = 128; // of a row, staged together
constant constexpr ushort max_staged = 96; // rows and keys

// Of values: rows and columns of a simdgroup.
constant constexpr ushort simd_rows = 8;
constant constexpr ushort slice_quads = 32;

// Loads of 16 bytes of the next tile that a thread starts before it works on
// the one at hand; each takes four registers.
constant constexpr ushort ahead = 2;

// Positions [begin, end).
struct Range {
  int begin;
  int end;

  bool empty() const {
    return end <= begin;
  }
  bool has(int position) const {
    return begin <= position && position < end;
  }
  Range within(int from, int to) const {
    return {max(begin, from), min(end, to)};
  }
};

// Positions are counted from that of an item's first row, `start`.
inline int position_of(constant Params& p, int start, int row) {
  return start + row / (p.H / p.K);
}

// What a row sees.
inline Range visible(constant Params& p, int position) {
  return {oldest_seen(position, p.window), position + 1};
}

// What at least one of the rows [first, last] sees.
inline Range visible(constant Params& p, int start, int first, int last) {
  return {
      visible(p, position_of(p, start, first)).begin,
      position_of(p, start, last) + 1};
}

inline bool attends(constant Params& p, constant Item& item, int length) {
  return attends(length, item.count, p.N, p.window);
}

// The span that the first state of an item is of.
inline int first_span(constant Params& p, int start) {
  return visible(p, start).begin / span;
}

inline int num_rows(constant Params& p, constant Item& item) {
  return item.positions * (p.H / p.K);
}

// Where a row of q or out begins.
inline ulong
row_at(constant Params& p, constant Item& item, uint head, int row) {
  int G = p.H / p.K;
  return (ulong(item.row + row / G) * p.H + head * G + row % G) * p.D;
}

// The first row of a head in what one launch leaves for the next: [items, K,
// rows of the item].
inline ulong
first_row_between(constant Params& p, constant Item& item, uint head) {
  return ulong(item.row) * p.H + ulong(head) * num_rows(p, item);
}

// The entry of a table that has page j of a sequence. Those of full attention
// never turn, and a division takes longer than all else about a page.
inline int turned(constant Params& p, int j) {
  return j < p.N ? j : j % p.N;
}

// The lines of an item's rows. For numbers that are none of the piece's others
// are read: such a piece is NaN in the end.
struct Tree {
  const device int* depths; // of the item's first row
  const device int* ancestors;
  int A;
  int count; // rows of the piece

  Tree(
      constant Params& p,
      constant Item& item,
      const device int* depths,
      const device int* ancestors)
      : depths(depths + item.row),
        ancestors(ancestors + item.row * p.ancestors),
        A(p.ancestors),
        count(item.count) {}

  bool has_depth(int row) const {
    return 0 <= depths[row] && depths[row] < min(A, count);
  }
  int depth(int row) const {
    return has_depth(row) ? depths[row] : 0;
  }
  bool has_ancestor(int row, int j) const {
    int ancestor = ancestors[row * A + j];
    return 0 <= ancestor && ancestor < count;
  }
  // The slot of position start + j, as a number from `start` on.
  int slot(int row, int j) const {
    return j >= 0 && has_ancestor(row, j) ? ancestors[row * A + j] : j;
  }
  // Whether all numbers are the piece's. A simdgroup asks together.
  bool whole(ushort lane) const {
    int wrong = 0;
    for (int row = lane; row < count; row += 32) {
      wrong |= !has_depth(row);
      for (int j = 0; j <= depth(row); ++j) {
        wrong |= !has_ancestor(row, j);
      }
    }
    return simd_max(wrong) == 0;
  }
};

// The page of a position, or page 0 where the table names none: such a piece is
// NaN in the end.
inline int page_read(
    constant Params& p,
    constant Item& item,
    const device int* tables,
    int position) {
  int page = tables[ulong(item.piece) * p.N + turned(p, position / page_size)];
  return is_page(page, p.P) ? page : 0;
}

// A threadgroup's item and the first of its rows.
struct Place {
  uint item;
  int first_row;

  Place(constant Params& p, constant Item* items, uint z)
      : item(z),
        first_row(0) {
    if (p.tiles > 1) {
      item = z / p.tiles;
      first_row = z % p.tiles * items[item].rows;
    }
  }
};

// a, or b where a is not greater: a NaN loses.
inline float greater(float a, float b) {
  return a > b ? a : b;
}

constant constexpr ulong nowhere = ~0ul;

// Rows of q and keys in threadgroup memory, a tile of each at a time. A part is
// the sixteen bytes that one load brings of it. Where a threadgroup's tiles are
// `whole`, all keys are seen and D is a multiple of the width: then no load is
// behind a condition.
template <typename T>
struct ScoreTile {
  static constant constexpr ushort width = tile_bytes / sizeof(T);
  static constant constexpr ushort quads = width / 4;
  static constant constexpr ushort loads = tile_bytes / 16; // of a row

  const device T* q;
  const device T* k;
  const threadgroup ulong* begins; // of each row, then of each key
  threadgroup float4* staged;
  ushort rows;
  int D;

  // Where a part of the first tile lies; undefined if its key is not seen.
  const device T* from(ushort part) const {
    const device T* base = part / loads < rows ? q : k;
    return base + begins[part / loads] + part % loads * Loaded<T>::elements;
  }

  // A part of the tile at d, whose first is at `from`.
  template <bool whole>
  uint4 load(const device T* from, ushort part, int d) const {
    if (!whole &&
        (begins[part / loads] == nowhere ||
         d + part % loads * Loaded<T>::elements >= D)) {
      return uint4(0);
    }
    return *(const device uint4*)(from + d);
  }

  // Neighbouring rows keep their quads of a step in different banks.
  static ushort at(ushort row, ushort quad) {
    return row * quads + (quad ^ (row & 1) * 4);
  }

  void store(ushort part, uint4 raw) const {
    // The quads of a part are neighbours, wherever they are
    threadgroup float4* to =
        staged + at(part / loads, part % loads * Loaded<T>::quads);
    for (ushort j = 0; j < Loaded<T>::quads; ++j) {
      to[j] = Loaded<T>::quad(raw, j);
    }
  }
};

// A lane's place in a staged tile: its quad of a step, of its rows and of every
// eighth key. Quads of odd steps are where even ones would be in rows of the
// other parity (ScoreTile::at).
template <typename T>
struct ScoreLane {
  const threadgroup float4* row;
  const threadgroup float4* even; // keys, in even steps
  const threadgroup float4* odd;

  ScoreLane(ScoreTile<T> tile, ushort own_row, ushort own_key, ushort lane) {
    ushort first = tile.rows + own_key + lane / 4;
    ushort quarter = lane % 4;
    row = tile.staged + tile.at(own_row, quarter);
    even = tile.staged + tile.at(first, quarter);
    odd = tile.staged + tile.at(first, 4 + quarter);
  }

  void multiply(thread float4 (&sums)[lane_rows][lane_keys], ushort step)
      const {
    constexpr ushort pitch = ScoreTile<T>::quads;
    const threadgroup float4* keys = step & 1 ? odd : even;
    float4 key[lane_keys];
#pragma unroll
    for (ushort i = 0; i < lane_keys; ++i) {
      key[i] = keys[i * 8 * pitch + step / 2 * 8];
    }
#pragma unroll
    for (ushort r = 0; r < lane_rows; ++r) {
      float4 x = row[r * pitch + (step ^ (r & 1)) * 4];
#pragma unroll
      for (ushort i = 0; i < lane_keys; ++i) {
        sums[r][i] = fma(x, key[i], sums[r][i]);
      }
    }
  }
};

// Multiplies the rows and keys of a threadgroup, tile by tile. While it works
// on one, the next one's first loads are under way.
template <bool whole, typename T>
inline void multiply_tiles(
    thread float4 (&sums)[lane_rows][lane_keys],
    ScoreTile<T> tile,
    ScoreLane<T> own,
    bool works,
    ushort parts,
    ushort thread_index,
    ushort threads) {
  typedef ScoreTile<T> Tile;
  const device T* from[ahead];
  uint4 next[ahead];
#pragma unroll
  for (ushort i = 0; i < ahead; ++i) {
    ushort part = thread_index + i * threads;
    if (part < parts) {
      from[i] = tile.from(part);
      next[i] = tile.template load<whole>(from[i], part, 0);
    }
  }
  for (int d = 0; d < tile.D; d += Tile::width) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (ushort i = 0; i < ahead; ++i) {
      ushort part = thread_index + i * threads;
      if (part < parts) {
        tile.store(part, next[i]);
      }
    }
    if (d + Tile::width < tile.D) {
#pragma unroll
      for (ushort i = 0; i < ahead; ++i) {
        ushort part = thread_index + i * threads;
        if (part < parts) {
          next[i] = tile.template load<whole>(from[i], part, d + Tile::width);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (works && whole) {
#pragma unroll
      for (ushort step = 0; step < Tile::width / 16; ++step) {
        own.multiply(sums, step);
      }
    } else if (works) {
      ushort steps = min(int(Tile::width), tile.D - d) / 16;
      for (ushort step = 0; step < steps; ++step) {
        own.multiply(sums, step);
      }
    }
  }
}

// 16 sums for each score, d = l, l + 16, ... in sum l; four lanes share them,
// four each, and read 16 d of a staged row together. A simdgroup has 4 rows and
// 32 keys, a lane all 4 of the rows and 4 of the keys; simdgroups beyond those
// only load.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(512)]] void block_attention_scores(
    const device T* q [[buffer(0)]], // [R, H, D]
    const device T* k [[buffer(1)]], // [P, K, 64, D]
    const device int* lengths [[buffer(2)]], // [Q]
    const device int* tables [[buffer(3)]], // [Q, N]
    device float* scores [[buffer(4)]], // [R * H, spans * 512]
    constant Params& p [[buffer(5)]],
    constant Item* items [[buffer(6)]],
    threadgroup float4* staged [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup ulong begins[max_staged];
  Place place(p, items, group.z);
  constant Item& item = items[place.item];
  int first_row = place.first_row;
  int length = lengths[item.piece];
  int R = num_rows(p, item);
  if (first_row >= R || !attends(p, item, length)) {
    return;
  }
  uint head = group.y;
  int start = length + item.first;
  ushort rows = min(item.rows, R - first_row);
  ushort row_groups = (item.rows + lane_rows - 1) / lane_rows;
  int from = first_span(p, start) * span;
  int base = from + group.x * p.keys;
  // Any row of a tree may see all slots
  Range slots = tree ? visible(p, start, 0, R - 1)
                     : visible(p, start, first_row, first_row + rows - 1);
  Range seen = slots.within(base, base + p.keys);
  if (seen.empty()) {
    return;
  }

  // Look up where rows and keys begin
  ulong page_at = ulong(page_read(p, item, tables, base)) * p.K + head;
  ulong key_at = (page_at * page_size + base % page_size) * p.D;
  typedef ScoreTile<T> Tile;
  Tile tile = {q, k, begins, staged, ushort(row_groups * lane_rows), p.D};
  ushort threads = simds * 32;
  ushort all = tile.rows + p.keys;
  for (ushort i = thread_index; i < all; i += threads) {
    ulong begin = nowhere;
    int position = base + i - tile.rows;
    if (i < tile.rows) { // those beyond the last are that one again
      begin = row_at(p, item, head, first_row + min(int(i), rows - 1));
    } else if (seen.has(position)) {
      begin = key_at + (position - base) * p.D;
    }
    begins[i] = begin;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Multiply
  ushort quarter = lane % 4;
  ushort own_row = simd % row_groups * lane_rows;
  ushort own_key = simd / row_groups * simd_keys;
  bool works = own_key < p.keys;
  ushort parts = all * Tile::loads;
  float4 sums[lane_rows][lane_keys] = {};
  ScoreLane<T> own(tile, own_row, own_key, lane);
  if (seen.end - seen.begin == p.keys && p.D % Tile::width == 0) {
    multiply_tiles<true>(sums, tile, own, works, parts, thread_index, threads);
  } else {
    multiply_tiles<false>(sums, tile, own, works, parts, thread_index, threads);
  }
  if (!works) {
    return;
  }

  // Add sums l and l + 8, then l + 4, l + 2, l + 1. In the first two steps a
  // lane gives half of its keys away and ends with the one of its own number.
  bool upper = lane & 2;
  bool odd = lane & 1;
  device float* out = scores +
      (first_row_between(p, item, head) + first_row + own_row) *
          (p.spans * span) +
      (base - from + own_key + 8 * quarter + lane / 4);
#pragma unroll
  for (ushort r = 0; r < lane_rows; ++r) {
    float4 a = simd_shuffle_xor(upper ? sums[r][0] : sums[r][2], 2);
    float4 b = simd_shuffle_xor(upper ? sums[r][1] : sums[r][3], 2);
    a += upper ? sums[r][2] : sums[r][0];
    b += upper ? sums[r][3] : sums[r][1];
    float4 c = simd_shuffle_xor(odd ? a : b, 1);
    c += odd ? b : a;
    if (own_row + r < rows) {
      out[ulong(r) * (p.spans * span)] = p.scale * ((c.x + c.z) + (c.y + c.w));
    }
  }
}

// The softmax of one row so far.
struct State {
  float largest;
  float sum; // 0: nothing seen

  // Takes a chunk in: a lane brings the scores of positions `lane` and
  // lane + 32, -inf where hidden, and gets their weights. Returns by what
  // earlier values fade.
  float add(thread float (&scores)[2], float minus_zero) {
    float most = greater(scores[1], greater(scores[0], -INFINITY));
    for (ushort step = 16; step > 0; step /= 2) {
      most = greater(most, simd_shuffle_xor(most, step));
    }
    bool grows = sum != 0.0f && most > largest;
    float fade = grows ? pyengine::exp(largest - most) : 1.0f;
    largest = grows || sum == 0.0f ? most : largest;
    scores[0] = pyengine::exp(scores[0] - largest);
    scores[1] = pyengine::exp(scores[1] - largest);
    // Sixteen sums of positions l, l + 16, l + 32, l + 48, then as for scores
    float total = (scores[0] + simd_shuffle_xor(scores[0], 16)) +
        (scores[1] + simd_shuffle_xor(scores[1], 16));
    for (ushort step = 8; step > 0; step /= 2) {
      total += simd_shuffle_xor(total, step);
    }
    sum = product(sum, fade, minus_zero) + total;
    return fade;
  }
};

// Values of a head in threadgroup memory, 128 columns of a few positions at a
// time: 256 loads. A thread brings the same sixteen bytes of every so many
// positions. There are no more threads than parts.
template <typename T>
struct ValueTile {
  static constant constexpr ushort positions = 32 / sizeof(T);
  static constant constexpr ushort loads = slice_quads / Loaded<T>::quads;
  static constant constexpr ushort parts = positions * loads;

  // Of the head in page 0, from the first column on.
  const device uint4* v;
  threadgroup float4* staged;
  Range seen;
  int own_page; // lane l has the page of the span's chunk l % 8
  uint page_pitch; // loads of a page, over all heads; below 2^32, which are 64
                   // GiB
  uint pitch; // loads of a row of v
  uint columns; // loads of a row that are within D

  ValueTile(
      constant Params& p,
      const device T* v,
      threadgroup float4* staged,
      uint head,
      Range seen,
      int own_page,
      int column)
      : v((const device uint4*)(v + ulong(head) * page_size * p.D + column)),
        staged(staged),
        seen(seen),
        own_page(own_page),
        pitch(p.D / Loaded<T>::elements),
        columns((p.D - column) / Loaded<T>::elements) {
    page_pitch = uint(p.K) * page_size * pitch;
  }

  // Where the tile that begins at a position lies, which is all in one page.
  const device uint4* find(int position) const {
    ushort lane = position / page_size % (span / page_size);
    return v + ulong(simd_shuffle(own_page, lane)) * page_pitch +
        uint(position % page_size) * pitch;
  }
  // The same where that of the tile before it is known.
  const device uint4* next(const device uint4* tile, int position) const {
    return position % page_size == 0 ? find(position)
                                     : tile + positions * pitch;
  }

  // A thread's parts of the tile that begins at a position: the first and one
  // every so many threads. Conditions are only in those tiles that an end of
  // what is seen cuts, and in a last slice of few columns.
  void load(
      thread uint4 (&raw)[ahead],
      const device uint4* tile,
      int begin,
      ushort first,
      ushort threads) const {
    bool whole = seen.begin <= begin && begin + positions <= seen.end &&
        loads <= columns;
    if (whole) {
      // The last first, which some threads do not have: so no other is under
      // way where they part
#pragma unroll
      for (short i = ahead - 1; i >= 0; --i) {
        ushort part = first + i * threads;
        if (i == 0 || part < parts) {
          raw[i] = tile[part / loads * pitch + part % loads];
        }
      }
    } else {
#pragma unroll
      for (ushort i = 0; i < ahead; ++i) {
        ushort part = first + i * threads;
        bool exists = part < parts && seen.has(begin + part / loads) &&
            part % loads < columns;
        raw[i] = 0;
        if (exists) {
          raw[i] = tile[part / loads * pitch + part % loads];
        }
      }
    }
  }

  void store(ushort part, uint4 raw) const {
    for (ushort j = 0; j < Loaded<T>::quads; ++j) {
      staged[part * Loaded<T>::quads + j] = Loaded<T>::quad(raw, j);
    }
  }
};

// The rows of a simdgroup, and all scores of their span.
struct SpanRows {
  int first; // of the item
  ushort count;
  int G; // rows of a position
  int positions; // of the item
  int oldest; // position of the item's first row
  int at[simd_rows]; // position of each row of a tree
  const device float* scores; // of the first row, at the span's first position
  uint pitch; // of rows of scores

  // Those that see a position, as numbers from the first on. Row R of the item
  // is of position oldest + R / G, which sees itself and window - 1 before it.
  Range seeing(constant Params& p, int position) const {
    int after = position - oldest;
    int begin = clamp(after, 0, positions);
    int end = clamp(after + min(p.window, int(max_positions)), 0, positions);
    return {begin * G - first, end * G - first};
  }
  bool sees(constant Params& p, ushort r, int position) const {
    return r < count && visible(p, at[r]).has(position);
  }
  // Row r's position in the item.
  int index(ushort r) const {
    return (first + r) / G;
  }
};

// Turns the scores of a chunk, all of which eight rows see, into
// weights[position, row]; values fade as their rows' states tell.
inline void weigh_chunk(
    thread State (&states)[simd_rows],
    thread float4 (&values)[simd_rows],
    thread const SpanRows& own,
    threadgroup float4* weights,
    int in_span, // where in the span the chunk begins
    float minus_zero,
    ushort lane) {
  const device float* from = own.scores + (in_span + lane);
#pragma unroll
  for (ushort half = 0; half < 2; ++half) { // of the rows: eight loads together
    float scores[4][2];
#pragma unroll
    for (ushort r = 0; r < 4; ++r) {
      scores[r][0] = from[0];
      scores[r][1] = from[32];
      from += own.pitch;
    }
#pragma unroll
    for (ushort r = 0; r < 4; ++r) {
      float fade = states[4 * half + r].add(scores[r], minus_zero);
      values[4 * half + r] *= fade;
    }
#pragma unroll
    for (ushort i = 0; i < 2; ++i) {
      weights[(32 * i + lane) * 2 + half] =
          float4(scores[0][i], scores[1][i], scores[2][i], scores[3][i]);
    }
  }
}

// The same where there are fewer rows, or one does not see all of the chunk.
inline void weigh_cut_chunk(
    thread State (&states)[simd_rows],
    thread float4 (&values)[simd_rows],
    thread const SpanRows& own,
    threadgroup float* weights,
    constant Params& p,
    int at,
    ushort lane) {
  Range low = own.seeing(p, at + lane), high = own.seeing(p, at + 32 + lane);
  Range some = {own.seeing(p, at).begin, own.seeing(p, at + chunk - 1).end};
  const device float* from = own.scores + (at % span + lane);
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    float scores[2] = {};
    if (r < own.count && some.has(r)) {
      scores[0] = low.has(r) ? from[0] : -INFINITY;
      scores[1] = high.has(r) ? from[32] : -INFINITY;
      values[r] *= states[r].add(scores, p.minus_zero);
    }
    weights[lane * simd_rows + r] = scores[0];
    weights[(32 + lane) * simd_rows + r] = scores[1];
    from += own.pitch;
  }
}

// The same for rows of a tree, whose scores from their piece's first position
// on are in the slots of their ancestors.
inline void weigh_tree_chunk(
    thread State (&states)[simd_rows],
    thread float4 (&values)[simd_rows],
    thread const SpanRows& own,
    thread const Tree& lines,
    threadgroup float* weights,
    constant Params& p,
    int at,
    ushort lane) {
  const device float* from = own.scores;
  int first = own.oldest - at / span * span; // slot of the piece's first row
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    float scores[2] = {};
    Range seen = {0, 0};
    if (r < own.count) {
      seen = visible(p, own.at[r]);
    }
    if (!seen.within(at, at + chunk).empty()) {
      for (ushort i = 0; i < 2; ++i) {
        int position = at + 32 * i + lane;
        scores[i] = -INFINITY;
        if (seen.has(position)) {
          int j = lines.slot(own.index(r), position - own.oldest);
          scores[i] = from[first + j];
        }
      }
      values[r] *= states[r].add(scores, p.minus_zero);
    }
    weights[lane * simd_rows + r] = scores[0];
    weights[(32 + lane) * simd_rows + r] = scores[1];
    from += own.pitch;
  }
}

// values[r] += weights[r] * v for one position, in rows [begin, end) of all:
// for others v may be anything, NaN included, so it is not multiplied by 0.
template <bool every>
inline void add_position(
    thread float4 (&values)[simd_rows],
    const threadgroup float4* weights,
    float4 v,
    Range seeing) {
  float4 low = weights[0], high = weights[1];
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    if (every || seeing.has(r)) {
      float weight = r < 4 ? low[r % 4] : high[r % 4];
      values[r] = fma(float4(weight), v, values[r]);
    }
  }
}

// The same for rows of a tree, of which any may see a position.
inline void add_where_seen(
    thread float4 (&values)[simd_rows],
    const threadgroup float4* weights,
    float4 v,
    thread const SpanRows& own,
    constant Params& p,
    int position) {
  float4 low = weights[0], high = weights[1];
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    if (own.sees(p, r, position)) {
      float weight = r < 4 ? low[r % 4] : high[r % 4];
      values[r] = fma(float4(weight), v, values[r]);
    }
  }
}

// The same where each row of a tree has a value of its own, four columns of
// which are at `from` in the slot that is the piece's first.
template <typename T>
inline void add_own_values(
    thread float4 (&values)[simd_rows],
    const threadgroup float* weights,
    thread const SpanRows& own,
    thread const Tree& lines,
    constant Params& p,
    constant Item& item,
    const device int* tables,
    const device T* v, // of the head in page 0, from a lane's column on
    int position) {
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    if (own.sees(p, r, position)) {
      int slot = own.oldest + lines.slot(own.index(r), position - own.oldest);
      ulong page = ulong(page_read(p, item, tables, slot)) * p.K;
      const device T* from = v + (page * page_size + slot % page_size) * p.D;
      float4 value(from[0], from[1], from[2], from[3]);
      values[r] = fma(float4(weights[r]), value, values[r]);
    }
  }
}

// A simdgroup owns 8 rows, and a lane four columns of each; chunks follow each
// other. Weights stay within the simdgroup, v is staged for all of them;
// simdgroups without rows only load.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void block_attention_values(
    const device T* v [[buffer(0)]], // [P, K, 64, D]
    const device int* lengths [[buffer(1)]], // [Q]
    const device int* tables [[buffer(2)]], // [Q, N]
    const device float* scores [[buffer(3)]], // [R * H, spans * 512]
    device float4* values_out [[buffer(4)]], // of an item: [K, spans, R, D / 4]
    device float2* states_out [[buffer(5)]], // the same: [K, spans, R]
    constant Params& p [[buffer(6)]],
    constant Item* items [[buffer(7)]],
    const device int* depths [[buffer(8), function_constant(tree)]], // [R]
    const device int* ancestors
    [[buffer(9), function_constant(tree)]], // [R, A]
    threadgroup float* all_weights [[threadgroup(0)]], // [rows / 8, 64, 8]
    threadgroup float4* staged [[threadgroup(1)]], // [positions, 32]
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  Place place(p, items, group.z);
  constant Item& item = items[place.item];
  int first_row = place.first_row;
  int length = lengths[item.piece];
  int R = num_rows(p, item);
  if (first_row >= R || !attends(p, item, length)) {
    return;
  }
  uint head = group.y;
  int start = length + item.first;
  int slices = (p.D / 4 + slice_quads - 1) / slice_quads;
  int index = group.x / slices;
  int column = group.x % slices * slice_quads * 4;
  int last_row = min(first_row + item.rows, R) - 1;
  int base = (first_span(p, start) + index) * span;
  Range some = tree ? visible(p, start, 0, R - 1)
                    : visible(p, start, first_row, last_row);
  Range seen = some.within(base, base + span);
  if (seen.empty()) {
    return;
  }
  // What rows have in the same place
  Range common = tree ? seen.within(base, start) : seen;
  Tree lines(p, item, tree ? depths : lengths, tree ? ancestors : lengths);

  // What the rows of this simdgroup see: any of them, and all of them
  SpanRows own;
  own.first = first_row + simd * simd_rows;
  own.count = clamp(last_row + 1 - own.first, 0, int(simd_rows));
  own.G = p.H / p.K;
  own.positions = item.positions;
  own.oldest = start;
  own.pitch = p.spans * span;
  own.scores = scores +
      (first_row_between(p, item, head) + own.first) * own.pitch + index * span;
  Range any = {base, base}, all = any;
  if (tree) {
    for (ushort r = 0; r < simd_rows; ++r) {
      own.at[r] = start + (r < own.count ? lines.depth(own.index(r)) : 0);
    }
  }
  if (own.count > 0 && tree) {
    any = common;
    all = common.within(visible(p, start + item.positions - 1).begin, start);
  } else if (own.count > 0) {
    Range first = visible(p, own.oldest + own.first / own.G);
    Range last = visible(p, own.oldest + (own.first + own.count - 1) / own.G);
    any = Range{first.begin, last.end}.within(base, base + span);
    all = Range{last.begin, first.end}.within(base, base + span);
  }
  threadgroup float* weights = all_weights + simd * (chunk * simd_rows);

  int own_page =
      page_read(p, item, tables, base + lane % (span / page_size) * page_size);
  ushort threads = simds * 32;
  typedef ValueTile<T> Tile;
  Tile tile(p, v, staged, head, common, own_page, column);
  State states[simd_rows] = {};
  float4 values[simd_rows] = {};
  int part_begin = seen.begin / Tile::positions * Tile::positions;
  uint4 next[ahead];
  const device uint4* from = tile.find(part_begin);
  tile.load(next, from, part_begin, thread_index, threads);
  for (int at = seen.begin / chunk * chunk; at < seen.end; at += chunk) {
    // Turn scores into weights
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (own.count == simd_rows && all.begin <= at && at + chunk <= all.end) {
      weigh_chunk(
          states,
          values,
          own,
          (threadgroup float4*)weights,
          at - base,
          p.minus_zero,
          lane);
    } else if (own.count > 0 && tree) {
      weigh_tree_chunk(states, values, own, lines, weights, p, at, lane);
    } else if (own.count > 0) {
      weigh_cut_chunk(states, values, own, weights, p, at, lane);
    }

    // Add values
    for (; part_begin < min(at + chunk, common.end);
         part_begin += Tile::positions) {
      int part_end = part_begin + Tile::positions;
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
      for (ushort i = 0; i < ahead; ++i) {
        ushort part = thread_index + i * threads;
        if (i == 0 || part < Tile::parts) {
          tile.store(part, next[i]);
        }
      }
      if (part_end < common.end) {
        from = tile.next(from, part_end);
        tile.load(next, from, part_end, thread_index, threads);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      auto quads = (const threadgroup float4*)weights + (part_begin - at) * 2;
      const threadgroup float4* column_quads = staged + lane;
      if (all.begin <= part_begin && part_end <= all.end) {
#pragma unroll
        for (ushort j = 0; j < Tile::positions; ++j) {
          float4 value = column_quads[j * slice_quads];
          add_position<true>(values, quads + 2 * j, value, Range{});
        }
      } else {
        Range in_tile = any.within(part_begin, part_end);
        for (int j = in_tile.begin; j < in_tile.end; ++j) {
          float4 value = column_quads[(j - part_begin) * slice_quads];
          auto own_quads = quads + 2 * (j - part_begin);
          if (tree) {
            add_where_seen(values, own_quads, value, own, p, j);
          } else {
            add_position<false>(values, own_quads, value, own.seeing(p, j));
          }
        }
      }
    }
    if (tree) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      int end = column / 4 + lane < p.D / 4 ? min(at + chunk, seen.end) : 0;
      const device T* head_values =
          v + ulong(head) * page_size * p.D + column + 4 * lane;
      for (int j = max(at, start); j < end; ++j) {
        add_own_values(
            values,
            weights + (j - at) * simd_rows,
            own,
            lines,
            p,
            item,
            tables,
            head_values,
            j);
      }
    }
  }

  // Store
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    if (r < own.count) {
      ulong state = first_row_between(p, item, head) * p.spans + index * R +
          own.first + r;
      if (column / 4 + lane < p.D / 4) {
        values_out[state * (p.D / 4) + column / 4 + lane] = values[r];
      }
      if (column == 0 && lane == 0) {
        states_out[state] = float2(states[r].largest, states[r].sum);
      }
    }
  }
}

// What the spans of a row have come to, in a thread's four columns.
struct Folded {
  float4 total;
  float largest;
  float sum;

  // The side with the lower peak fades.
  void add(float4 value, float2 state, float minus_zero) {
    bool grows = state.x > largest;
    float fade = pyengine::exp(grows ? largest - state.x : state.x - largest);
    float keep = grows ? fade : 1.0f, take = grows ? 1.0f : fade;
    total = product(total, keep, minus_zero) + product(value, take, minus_zero);
    sum = product(sum, keep, minus_zero) + product(state.y, take, minus_zero);
    largest = grows ? state.x : largest;
  }
};

// Where the next span of a row lies, for a thread.
struct SpanCursor {
  const device float4* value;
  const device float2* state;
  uint R;
  uint width; // of a row, in four columns

  // Folds n spans, whose loads start together: folding must wait for each.
  template <ushort n>
  void fold(thread Folded& folded, float minus_zero) {
    float4 values[n];
    float2 states[n];
#pragma unroll
    for (ushort i = 0; i < n; ++i) {
      values[i] = value[i * R * width];
      states[i] = state[i * R];
    }
    value += n * R * width;
    state += n * R;
#pragma unroll
    for (ushort i = 0; i < n; ++i) {
      folded.add(values[i], states[i], minus_zero);
    }
  }
};

// Whether the pages that a piece sees are all of the P. A simdgroup asks
// together.
inline bool has_pages(
    constant Params& p,
    constant Item& item,
    const device int* table, // [N]
    int length,
    ushort lane) {
  int first = visible(p, length).begin / page_size;
  int count = (length + item.count - 1) / page_size - first + 1; // at most N
  first = turned(p, first);
  int missing = 0;
  for (int i = lane; i < count; i += 32) {
    int at = first + i;
    missing |= !is_page(table[at < p.N ? at : at - p.N], p.P);
  }
  return simd_max(missing) == 0;
}

// A threadgroup owns a row, a thread four of its columns.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void block_attention_fold(
    const device int* lengths [[buffer(0)]], // [Q]
    const device int* tables [[buffer(1)]], // [Q, N]
    const device float4* values
    [[buffer(2)]], // of an item: [K, spans, R, D / 4]
    const device float2* states [[buffer(3)]], // the same: [K, spans, R]
    device T* out [[buffer(4)]], // [R, H, D]
    constant Params& p [[buffer(5)]],
    constant Item* items [[buffer(6)]],
    const device int* depths [[buffer(7), function_constant(tree)]], // [R]
    const device int* ancestors
    [[buffer(8), function_constant(tree)]], // [R, A]
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constant Item& item = items[group.z];
  int row = group.x;
  uint head = group.y;
  int R = num_rows(p, item);
  if (row >= R) {
    return;
  }
  int length = lengths[item.piece];
  const device int* table = tables + ulong(item.piece) * p.N;
  bool whole =
      attends(p, item, length) && has_pages(p, item, table, length, lane);
  Tree lines(p, item, tree ? depths : lengths, tree ? ancestors : lengths);
  whole = whole && (!tree || lines.whole(lane));
  if (thread_index >= p.D / 4) {
    return;
  }
  device T* to = out + row_at(p, item, head, row) + 4 * thread_index;
  if (!whole) {
    for (ushort i = 0; i < 4; ++i) {
      to[i] = T(NAN);
    }
    return;
  }
  int start = length + item.first;
  int base = first_span(p, start);
  Range seen = visible(
      p,
      tree ? start + lines.depth(row / (p.H / p.K))
           : position_of(p, start, row));
  int first = seen.begin / span - base;
  int left = (seen.end + span - 1) / span - base - first;

  uint width = p.D / 4;
  ulong at = first_row_between(p, item, head) * p.spans + first * R + row;
  SpanCursor next = {
      values + at * width + thread_index, states + at, uint(R), width};
  Folded folded = {0.0f, -INFINITY, 0.0f};
  for (; left >= 4; left -= 4) {
    next.template fold<4>(folded, p.minus_zero);
  }
  if (left >= 2) {
    next.template fold<2>(folded, p.minus_zero);
  }
  if (left % 2 == 1) {
    next.template fold<1>(folded, p.minus_zero);
  }
  float4 mean = folded.total / folded.sum;
  for (ushort i = 0; i < 4; ++i) {
    to[i] = T(mean[i]);
  }
}

INSTANTIATE("block_attention_scores_float32", block_attention_scores, float)
INSTANTIATE("block_attention_scores_float16", block_attention_scores, half)
INSTANTIATE("block_attention_scores_bfloat16", block_attention_scores, bfloat)
INSTANTIATE("block_attention_values_float32", block_attention_values, float)
INSTANTIATE("block_attention_values_float16", block_attention_values, half)
INSTANTIATE("block_attention_values_bfloat16", block_attention_values, bfloat)
INSTANTIATE("block_attention_fold_float32", block_attention_fold, float)
INSTANTIATE("block_attention_fold_float16", block_attention_fold, half)
INSTANTIATE("block_attention_fold_bfloat16", block_attention_fold, bfloat)

} // namespace pyengine
