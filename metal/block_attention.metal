// block_attention: softmax(scale * q @ k.T + mask) @ v for up to 16 positions
// of one block against a linear or ring cache, in three launches:
//
// * scores: q @ k.T. A threadgroup takes 64 keys of a head (32 for more than 16
//   rows) and up to 64 rows, which are the positions times the H / K query
//   heads that share the keys.
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
// from a single key head: C / 64 threadgroups, then C / 512 * D / 128.
//
// Why these tiles. Figures of a core are those in quantized_matmul.metal.
// * Scores: 4 rows and 4 keys make 64 partial sums of a lane, in all some 104
//   registers: 208 KiB are 16 simdgroups, 64 rows of 32 keys. A quad from
//   threadgroup memory serves 8 fma of four.
// * Such a threadgroup has the core to itself, so a thread asks for the next
//   tile before it works on this one.
// * Values: 32 sums per lane; weights take 2 KiB per simdgroup, v 8 KiB: at 48
//   rows a core has room for three threadgroups. A quad serves 11 fma of four.
// * R rows make R / 2 fma per byte of bfloat16: past 30 rows an M4 Max core,
//   with 15 per byte, is bound by arithmetic, whatever is read.
//
// Chunks of 64 and spans of 512 are cut at absolute positions, and all sums run
// in the order of csrc/ops/block_attention_cpu.cpp. So the bits are those of
// the processor, and depend on a row and its visible keys alone: not on T, C,
// the ring or the grid, which follows from shapes while offset and start are
// read here. Where there are no such positions, or the cache is too small to
// hold what they see, nothing is read and all is NaN.
//
// Limits: D a multiple of 16, at most 512; q, k and v on 16 bytes.
#include "block_attention_params.h"
#include "ordered_sum.h"
#include "positions.h"

constant bool has_start [[function_constant(0)]];

namespace pyengine {

typedef BlockAttentionParams Params;

constant constexpr int chunk = 64; // positions of one step of a softmax
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
constant constexpr ushort fold_ahead = 4; // spans

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

inline int position_of(constant Params& p, int offset, int row) {
  return offset + p.first + row / (p.H / p.K);
}

// What a row sees.
inline Range visible(constant Params& p, int position) {
  return {max(0, position - p.window + 1), position + 1};
}

// What at least one of the rows [first, last] sees.
inline Range visible(constant Params& p, int offset, int first, int last) {
  return {
      visible(p, position_of(p, offset, first)).begin,
      position_of(p, offset, last) + 1};
}

inline bool attends(constant Params& p, int offset) {
  return attends(offset, p.T, p.C, p.window);
}

// The span that the first state of a slice is of.
inline int first_span(constant Params& p, int offset) {
  return visible(p, offset + p.first).begin / span;
}

inline int num_rows(constant Params& p) {
  return p.positions * (p.H / p.K);
}

// Where a row of q or out begins.
inline ulong row_at(constant Params& p, uint head, int row) {
  int G = p.H / p.K;
  ulong position = ulong(head / p.K) * p.T + p.first + row / G;
  return (position * p.H + head % p.K * G + row % G) * p.D;
}

// Where the keys or values of up to C positions from `from` on begin.
struct Slots {
  ulong head_at;
  int from;
  int first; // slot of `from`
  int C;
  int D;

  Slots(constant Params& p, uint head, int from, int start)
      : head_at(ulong(head) * p.C),
        from(from),
        C(p.C),
        D(p.D) {
    first = slot_from(start, from, C);
  }

  ulong at(int position) const {
    int slot = first + position - from;
    return (head_at + (slot < C ? slot : slot - C)) * D;
  }
};

// a, or b where a is not greater: a NaN loses.
inline float greater(float a, float b) {
  return a > b ? a : b;
}

constant constexpr ulong nowhere = ~0ul;

// Rows of q and keys in threadgroup memory, a tile of each at a time.
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

  // Sixteen bytes of the tile that begins at d.
  uint4 load(ushort part, int d) const {
    ulong begin = begins[part / loads];
    d += part % loads * Loaded<T>::elements;
    if (begin == nowhere || d >= D) {
      return uint4(0);
    }
    const device T* from = part / loads < rows ? q : k;
    return *(const device uint4*)(from + begin + d);
  }

  // Neighbouring rows keep their quads of a step in different banks.
  static ushort at(ushort row, ushort quad) {
    return row * quads + (quad ^ (row & 1) * 4);
  }

  void store(ushort part, uint4 raw) const {
    ushort quad = part % loads * Loaded<T>::quads;
    for (ushort j = 0; j < Loaded<T>::quads; ++j) {
      staged[at(part / loads, quad + j)] = Loaded<T>::quad(raw, j);
    }
  }

  float4 quad(ushort row, ushort quad) const {
    return staged[at(row, quad)];
  }
};

// 16 sums for each score, d = l, l + 16, ... in sum l; four lanes share them,
// four each, and read 16 d of a staged row together. A simdgroup has 4 rows and
// 32 keys, a lane all 4 of the rows and 4 of the keys; simdgroups beyond those
// only load.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(512)]] void block_attention_scores(
    const device T* q [[buffer(0)]], // [B, T, H, D]
    const device T* k [[buffer(1)]], // [B, K, C, D]
    const device int* offset_of_block [[buffer(2)]],
    device float* scores [[buffer(3)]], // [B * K, R, spans * 512]
    constant Params& p [[buffer(4)]],
    const device int* first_slot [[buffer(5), function_constant(has_start)]],
    threadgroup float4* staged [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup ulong begins[max_staged];
  int offset = *offset_of_block;
  if (!attends(p, offset)) {
    return;
  }
  uint head = group.y;
  int R = num_rows(p);
  int first_row = group.z * p.rows;
  ushort rows = min(p.rows, R - first_row);
  ushort row_groups = (p.rows + lane_rows - 1) / lane_rows;
  int from = first_span(p, offset) * span;
  int base = from + group.x * p.keys;
  Range seen = visible(p, offset, first_row, first_row + rows - 1)
                   .within(base, base + p.keys);
  if (seen.empty()) {
    return;
  }

  // Look up where rows and keys begin
  int start = 0;
  if (has_start) {
    start = *first_slot;
  }
  Slots slots(p, head, seen.begin, start);
  typedef ScoreTile<T> Tile;
  Tile tile = {q, k, begins, staged, ushort(row_groups * lane_rows), p.D};
  ushort threads = simds * 32;
  ushort all = tile.rows + p.keys;
  for (ushort i = thread_index; i < all; i += threads) {
    ulong begin = nowhere;
    int position = base + i - tile.rows;
    if (i < rows) {
      begin = row_at(p, head, first_row + i);
    } else if (i >= tile.rows && seen.has(position)) {
      begin = slots.at(position);
    }
    begins[i] = begin;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Multiply, tile by tile
  ushort quarter = lane % 4;
  ushort own_row = simd % row_groups * lane_rows;
  ushort own_key = simd / row_groups * simd_keys;
  bool works = own_key < p.keys;
  ushort parts = all * Tile::loads;
  float4 sums[lane_rows][lane_keys] = {};
  uint4 next[ahead];
#pragma unroll
  for (ushort i = 0; i < ahead; ++i) {
    ushort part = thread_index + i * threads;
    next[i] = part < parts ? tile.load(part, 0) : uint4(0);
  }
  for (int d = 0; d < p.D; d += Tile::width) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (ushort i = 0; i < ahead; ++i) {
      ushort part = thread_index + i * threads;
      if (part < parts) {
        tile.store(part, next[i]);
        next[i] = tile.load(part, d + Tile::width);
      }
    }
    for (ushort part = thread_index + ahead * threads; part < parts;
         part += threads) {
      tile.store(part, tile.load(part, d));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    ushort steps = works ? min(int(Tile::width), p.D - d) / 16 : 0;
    for (ushort step = 0; step < steps; ++step) {
      ushort quad = 4 * step + quarter;
      float4 key[lane_keys];
#pragma unroll
      for (ushort i = 0; i < lane_keys; ++i) {
        key[i] = tile.quad(tile.rows + own_key + 8 * i + lane / 4, quad);
      }
#pragma unroll
      for (ushort r = 0; r < lane_rows; ++r) {
        float4 x = tile.quad(own_row + r, quad);
#pragma unroll
        for (ushort i = 0; i < lane_keys; ++i) {
          sums[r][i] = fma(x, key[i], sums[r][i]);
        }
      }
    }
  }
  if (!works) {
    return;
  }

  // Add sums l and l + 8, then l + 4, l + 2, l + 1. In the first two steps a
  // lane gives half of its keys away and ends with the one of its own number.
  bool upper = lane & 2;
  bool odd = lane & 1;
  device float* out = scores +
      (ulong(head) * R + first_row + own_row) * (p.spans * span) +
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
// time: 256 loads.
template <typename T>
struct ValueTile {
  static constant constexpr ushort positions = 32 / sizeof(T);
  static constant constexpr ushort loads = slice_quads / Loaded<T>::quads;
  static constant constexpr ushort parts = positions * loads;

  const device T* v;
  threadgroup float4* staged;
  Slots slots;
  Range seen;
  int column;

  // Sixteen bytes of the tile that begins at a position.
  uint4 load(ushort part, int begin) const {
    int position = begin + part / loads;
    int d = column + part % loads * Loaded<T>::elements;
    if (!seen.has(position) || d >= slots.D) {
      return uint4(0);
    }
    return *(const device uint4*)(v + slots.at(position) + d);
  }

  void store(ushort part, uint4 raw) const {
    for (ushort j = 0; j < Loaded<T>::quads; ++j) {
      staged[part * Loaded<T>::quads + j] = Loaded<T>::quad(raw, j);
    }
  }

  float4 quad(int position, ushort lane) const {
    return staged[position % positions * slice_quads + lane];
  }
};

// values[r] += weights[position, r] * v[position] for the positions of `range`,
// one after the other. Where not every row sees all of them, `every` is false,
// and a row passes over what it does not see: that may be anything, NaN
// included, so it is not multiplied by 0.
template <bool every, typename Tile>
inline void weigh(
    thread float4 (&values)[simd_rows],
    const threadgroup float4* weights,
    thread const Tile& tile,
    Range range,
    thread const Range (&seen_by)[simd_rows],
    ushort lane) {
  for (int j = range.begin; j < range.end; ++j) {
    float4 v = tile.quad(j, lane);
    float4 low = weights[j % chunk * 2], high = weights[j % chunk * 2 + 1];
#pragma unroll
    for (ushort r = 0; r < simd_rows; ++r) {
      if (every || seen_by[r].has(j)) {
        float weight = r < 4 ? low[r % 4] : high[r % 4];
        values[r] = fma(float4(weight), v, values[r]);
      }
    }
  }
}

// A simdgroup owns 8 rows, and a lane four columns of each; chunks follow each
// other. Weights stay within the simdgroup, v is staged for all of them;
// simdgroups without rows only load.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void block_attention_values(
    const device T* v [[buffer(0)]], // [B, K, C, D]
    const device int* offset_of_block [[buffer(1)]],
    const device float* scores [[buffer(2)]], // [B * K, R, spans * 512]
    device float4* values_out [[buffer(3)]], // [B * K, spans, R, D / 4]
    device float2* states_out [[buffer(4)]], // [B * K, spans, R]
    constant Params& p [[buffer(5)]],
    const device int* first_slot [[buffer(6), function_constant(has_start)]],
    threadgroup float* all_weights [[threadgroup(0)]], // [rows / 8, 64, 8]
    threadgroup float4* staged [[threadgroup(1)]], // [positions, 32]
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  int offset = *offset_of_block;
  if (!attends(p, offset)) {
    return;
  }
  uint head = group.y;
  int R = num_rows(p);
  int slices = (p.D / 4 + slice_quads - 1) / slice_quads;
  int index = group.x / slices;
  int column = group.x % slices * slice_quads * 4;
  int first_row = group.z * p.rows;
  int last_row = min(first_row + p.rows, R) - 1;
  int base = (first_span(p, offset) + index) * span;
  Range seen =
      visible(p, offset, first_row, last_row).within(base, base + span);
  if (seen.empty()) {
    return;
  }

  // What the rows of this simdgroup see: any of them, and all of them
  int own_row = first_row + simd * simd_rows;
  ushort rows = clamp(last_row + 1 - own_row, 0, int(simd_rows));
  Range seen_by[simd_rows];
  Range any = {base, base}, all = {base, base + span};
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    seen_by[r] = Range{base, base};
    if (r < rows) {
      int position = position_of(p, offset, own_row + r);
      seen_by[r] = visible(p, position).within(base, base + span);
      any.begin = r == 0 ? seen_by[r].begin : any.begin;
      any.end = seen_by[r].end;
      all = seen_by[r].within(all.begin, all.end);
    }
  }
  threadgroup float* weights = all_weights + simd * (chunk * simd_rows);
  const device float* own_scores =
      scores + (ulong(head) * R + own_row) * (p.spans * span) + index * span;

  int start = 0;
  if (has_start) {
    start = *first_slot;
  }
  ushort threads = simds * 32;
  typedef ValueTile<T> Tile;
  Tile tile = {v, staged, Slots(p, head, seen.begin, start), seen, column};
  State states[simd_rows] = {};
  float4 values[simd_rows] = {};
  int part_begin = seen.begin / Tile::positions * Tile::positions;
  uint4 next[ahead];
#pragma unroll
  for (ushort i = 0; i < ahead; ++i) {
    ushort part = thread_index + i * threads;
    next[i] = part < Tile::parts ? tile.load(part, part_begin) : uint4(0);
  }
  for (int at = seen.begin / chunk * chunk; at < seen.end; at += chunk) {
    // Turn scores into weights
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (ushort r = 0; r < simd_rows; ++r) {
      float own[2] = {};
      if (!seen_by[r].within(at, at + chunk).empty()) {
#pragma unroll
        for (ushort i = 0; i < 2; ++i) {
          int position = at + 32 * i + lane;
          own[i] = -INFINITY;
          if (seen_by[r].has(position)) {
            own[i] = own_scores[ulong(r) * (p.spans * span) + position - base];
          }
        }
        values[r] *= states[r].add(own, p.minus_zero);
      }
      if (rows > 0) {
        weights[lane * simd_rows + r] = own[0];
        weights[(32 + lane) * simd_rows + r] = own[1];
      }
    }

    // Add values
    for (; part_begin < min(at + chunk, seen.end);
         part_begin += Tile::positions) {
      int part_end = part_begin + Tile::positions;
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
      for (ushort i = 0; i < ahead; ++i) {
        ushort part = thread_index + i * threads;
        if (part < Tile::parts) {
          tile.store(part, next[i]);
          next[i] = tile.load(part, part_end);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      Range in_tile = any.within(part_begin, part_end);
      auto quads = (const threadgroup float4*)weights;
      if (all.begin <= in_tile.begin && in_tile.end <= all.end) {
        weigh<true>(values, quads, tile, in_tile, seen_by, lane);
      } else {
        weigh<false>(values, quads, tile, in_tile, seen_by, lane);
      }
    }
  }

  // Store
#pragma unroll
  for (ushort r = 0; r < simd_rows; ++r) {
    if (r < rows) {
      ulong state = (ulong(head) * p.spans + index) * R + own_row + r;
      if (column / 4 + lane < p.D / 4) {
        values_out[state * (p.D / 4) + column / 4 + lane] = values[r];
      }
      if (column == 0 && lane == 0) {
        states_out[state] = float2(states[r].largest, states[r].sum);
      }
    }
  }
}

// A threadgroup owns a row, a thread four of its columns.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void block_attention_fold(
    const device int* offset_of_block [[buffer(0)]],
    const device float4* values [[buffer(1)]], // [B * K, spans, R, D / 4]
    const device float2* states [[buffer(2)]], // [B * K, spans, R]
    device T* out [[buffer(3)]], // [B, T, H, D]
    constant Params& p [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  int row = group.x;
  uint head = group.y;
  int R = num_rows(p);
  int offset = *offset_of_block;
  if (thread_index >= p.D / 4) {
    return;
  }
  device T* to = out + row_at(p, head, row) + 4 * thread_index;
  if (!attends(p, offset)) {
    for (ushort i = 0; i < 4; ++i) {
      to[i] = T(NAN);
    }
    return;
  }
  int base = first_span(p, offset);
  Range seen = visible(p, position_of(p, offset, row));
  int first = seen.begin / span - base;
  int last = (seen.end + span - 1) / span - base;

  float4 total = 0.0f;
  float largest = -INFINITY, sum = 0.0f;
  for (int begin = first; begin < last; begin += fold_ahead) {
    // Loads of a few spans start together: folding must wait for each
    float4 value[fold_ahead];
    float2 state[fold_ahead];
#pragma unroll
    for (ushort j = 0; j < fold_ahead; ++j) {
      if (begin + j < last) {
        ulong at = (ulong(head) * p.spans + begin + j) * R + row;
        value[j] = values[at * (p.D / 4) + thread_index];
        state[j] = states[at];
      }
    }
#pragma unroll
    for (ushort j = 0; j < fold_ahead; ++j) {
      if (begin + j < last) {
        // The side with the lower peak fades
        bool grows = state[j].x > largest;
        float fade =
            pyengine::exp(grows ? largest - state[j].x : state[j].x - largest);
        float keep = grows ? fade : 1.0f, take = grows ? 1.0f : fade;
        total = product(total, keep, p.minus_zero) +
            product(value[j], take, p.minus_zero);
        sum = product(sum, keep, p.minus_zero) +
            product(state[j].y, take, p.minus_zero);
        largest = grows ? state[j].x : largest;
      }
    }
  }
  float4 mean = total / sum;
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
