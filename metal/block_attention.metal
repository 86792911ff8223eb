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
// 8 heads), and once more for every 64 rows beyond; a hidden one never. What
// lies between, 4 bytes a score and D + 2 floats a span and row, is written and
// read once, the scores once for every 128 columns: beside the keys and values
// R / 128 of their bytes for bfloat16 and D = 512, R the rows: 6 % at T = 1 and
// eight heads, 38 % at T = 6.
//
// Why three. Scores want 16 partial sums each, values an accumulator for each
// row and column: registers hold one or the other. And a span's values can
// start only when its scores are there, so launches of their own fill the GPU
// from a single key head: C / 64 threadgroups, then C / 512 * D / 128.
//
// Chunks of 64 and spans of 512 are cut at absolute positions, and all sums run
// in the order of csrc/block_attention_cpu.cpp. So the bits are those of the
// processor, and depend on a row and its visible keys alone: not on T, C, the
// ring or the grid, which follows from shapes while offset and start are read
// here.
//
// Limits: D a multiple of 16, at most 512; q, k and v on 16 bytes.
#include "block_attention_params.h"
#include "ordered_sum.h"

using namespace pyengine;

constant bool has_start [[function_constant(0)]];

typedef BlockAttentionParams Params;

constant constexpr int chunk = 64; // positions of one step of a softmax
constant constexpr int span = 512; // positions of one state

// Of scores: a quarter of a simdgroup's 16 sums for each of these in a lane.
constant constexpr ushort lane_rows = 4, lane_keys = 4;
constant constexpr ushort simd_keys = 8 * lane_keys;
constant constexpr ushort tile_bytes = 128; // of a row, staged together
constant constexpr ushort max_staged = 96; // rows and keys

// Of values: rows and columns of a simdgroup; positions staged together.
constant constexpr ushort simd_rows = 8;
constant constexpr ushort slice_quads = 32;
constant constexpr ushort staged_positions = 16;

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

// Where a key or value begins.
inline ulong key_at(constant Params& p, uint head, int position, int start) {
  int slot = (position - start) % p.C;
  slot = slot < 0 ? slot + p.C : slot;
  return (ulong(head) * p.C + slot) * p.D;
}

// a, or b where a is not greater: a NaN loses.
inline float greater(float a, float b) {
  return a > b ? a : b;
}

constant constexpr ulong nowhere = ~0ul;

// Neighbouring rows keep their quads of a step in different banks.
template <ushort quads>
inline ushort staged_at(ushort row, ushort quad) {
  return row * quads + (quad ^ (row & 1) * 4);
}

// 16 sums for each score, d = l, l + 16, ... in sum l; four lanes share them,
// four each, and read 16 d of a staged row together. A simdgroup has 4 rows and
// 32 keys, a lane all 4 of the rows and 4 of the keys.
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
  constexpr ushort elements = Loaded<T>::elements; // of 16 bytes
  constexpr ushort tile = tile_bytes / sizeof(T);
  constexpr ushort loads = tile_bytes / 16;
  constexpr ushort quads = tile / 4;
  threadgroup ulong begins[max_staged];

  int offset = *offset_of_block;
  uint head = group.y;
  int R = num_rows(p);
  int first_row = group.z * p.rows;
  ushort rows = min(p.rows, R - first_row);
  ushort row_groups = (p.rows + lane_rows - 1) / lane_rows;
  ushort staged_rows = row_groups * lane_rows;
  ushort keys = simds / row_groups * simd_keys;
  int from = first_span(p, offset) * span;
  int base = from + group.x * keys;
  Range seen = visible(p, offset, first_row, first_row + rows - 1)
                   .within(base, base + keys);
  if (seen.empty()) {
    return;
  }

  int start = 0;
  if (has_start) {
    start = *first_slot;
  }
  ushort threads = simds * 32;
  for (ushort i = thread_index; i < staged_rows + keys; i += threads) {
    ulong begin = nowhere;
    if (i < rows) {
      begin = row_at(p, head, first_row + i);
    } else if (i >= staged_rows && seen.has(base + i - staged_rows)) {
      begin = key_at(p, head, base + i - staged_rows, start);
    }
    begins[i] = begin;
  }

  ushort quarter = lane % 4;
  ushort own_row = simd % row_groups * lane_rows;
  ushort own_key = simd / row_groups * simd_keys;
  float4 sums[lane_rows][lane_keys] = {};
  for (int d = 0; d < p.D; d += tile) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (ushort i = thread_index; i < (staged_rows + keys) * loads;
         i += threads) {
      ushort row = i / loads;
      ushort at = i % loads;
      uint4 raw = uint4(0);
      if (begins[row] != nowhere && d + at * elements < p.D) {
        const device T* of = row < staged_rows ? q : k;
        raw = *(const device uint4*)(of + begins[row] + d + at * elements);
      }
      for (ushort j = 0; j < Loaded<T>::quads; ++j) {
        staged[staged_at<quads>(row, at * Loaded<T>::quads + j)] =
            Loaded<T>::quad(raw, j);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    ushort steps = min(int(tile), p.D - d) / 16;
    for (ushort step = 0; step < steps; ++step) {
      ushort quad = 4 * step + quarter;
      float4 key[lane_keys];
#pragma unroll
      for (ushort i = 0; i < lane_keys; ++i) {
        ushort row = staged_rows + own_key + 8 * i + lane / 4;
        key[i] = staged[staged_at<quads>(row, quad)];
      }
#pragma unroll
      for (ushort r = 0; r < lane_rows; ++r) {
        float4 x = staged[staged_at<quads>(own_row + r, quad)];
#pragma unroll
        for (ushort i = 0; i < lane_keys; ++i) {
          sums[r][i] = fma(x, key[i], sums[r][i]);
        }
      }
    }
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

// values[r] += weights[position, r] * v[position] for the staged positions of
// `range`, one after the other. Where not every row sees all of them, `every`
// is false, and a row passes over what it does not see: that may be anything,
// NaN included, so it is not multiplied by 0.
template <bool every>
inline void weigh(
    thread float4 (&values)[simd_rows],
    const threadgroup float4* weights,
    const threadgroup float4* staged,
    Range range,
    thread const Range (&seen)[simd_rows],
    ushort lane) {
  for (int j = range.begin; j < range.end; ++j) {
    float4 v = staged[j % staged_positions * slice_quads + lane];
    float4 low = weights[j % chunk * 2], high = weights[j % chunk * 2 + 1];
#pragma unroll
    for (ushort r = 0; r < simd_rows; ++r) {
      if (every || seen[r].has(j)) {
        float weight = r < 4 ? low[r % 4] : high[r % 4];
        values[r] = fma(float4(weight), v, values[r]);
      }
    }
  }
}

// A simdgroup owns 8 rows, and a lane four columns of each; chunks follow each
// other. Weights stay within the simdgroup, v is staged for all of them.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(256)]] void block_attention_values(
    const device T* v [[buffer(0)]], // [B, K, C, D]
    const device int* offset_of_block [[buffer(1)]],
    const device float* scores [[buffer(2)]], // [B * K, R, spans * 512]
    device float4* values_out [[buffer(3)]], // [B * K, spans, R, D / 4]
    device float2* states_out [[buffer(4)]], // [B * K, spans, R]
    constant Params& p [[buffer(5)]],
    const device int* first_slot [[buffer(6), function_constant(has_start)]],
    threadgroup float* all_weights [[threadgroup(0)]], // [simds, 64, 8]
    threadgroup float4* staged [[threadgroup(1)]], // [16, 32]
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr ushort elements = Loaded<T>::elements;
  constexpr ushort loads = slice_quads / Loaded<T>::quads; // of a value
  int offset = *offset_of_block;
  uint head = group.y;
  int R = num_rows(p);
  int slices = (p.D / 4 + slice_quads - 1) / slice_quads;
  int index = group.x / slices;
  int column = group.x % slices * slice_quads * 4;
  int first_row = group.z * p.rows;
  int last_row = min(first_row + p.rows, R) - 1;
  int from = first_span(p, offset) * span;
  int base = from + index * span;
  Range seen =
      visible(p, offset, first_row, last_row).within(base, base + span);
  if (seen.empty()) {
    return;
  }
  int start = 0;
  if (has_start) {
    start = *first_slot;
  }

  // Rows of this simdgroup
  int own_row = first_row + simd * simd_rows;
  ushort rows = clamp(last_row + 1 - own_row, 0, int(simd_rows));
  threadgroup float* weights = all_weights + simd * (chunk * simd_rows);
  const device float* own_scores =
      scores + (ulong(head) * R + own_row) * (p.spans * span) + (index * span);
  Range seen_by[simd_rows];
  Range any = {base, base}, all = {base, base};
  for (ushort r = 0; r < simd_rows; ++r) {
    seen_by[r] = {base, base};
    if (r < rows) {
      seen_by[r] = visible(p, position_of(p, offset, own_row + r))
                       .within(base, base + span);
    }
  }
  if (rows > 0) {
    Range newest = visible(p, position_of(p, offset, own_row + rows - 1));
    any = Range{seen_by[0].begin, newest.end}.within(base, base + span);
    all = Range{newest.begin, seen_by[0].end}.within(base, base + span);
  }

  State states[simd_rows] = {};
  float4 values[simd_rows] = {};
  for (int at = seen.begin / chunk * chunk; at < seen.end; at += chunk) {
    // Weights of the chunk
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (ushort r = 0; r < simd_rows; ++r) {
      float own[2] = {};
      if (!seen_by[r].within(at, at + chunk).empty()) {
        for (ushort i = 0; i < 2; ++i) {
          int position = at + 32 * i + lane;
          own[i] = -INFINITY;
          if (seen_by[r].has(position)) {
            own[i] = own_scores[ulong(r) * (p.spans * span) + position - base];
          }
        }
        values[r] *= states[r].add(own, p.minus_zero);
      }
      weights[lane * simd_rows + r] = own[0];
      weights[(32 + lane) * simd_rows + r] = own[1];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    int end = min(at + chunk, seen.end);
    for (int part = at; part < end; part += staged_positions) {
      Range needed = seen.within(part, part + staged_positions);
      if (needed.empty()) {
        continue;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (ushort i = thread_index; i < staged_positions * loads;
           i += simds * 32) {
        int position = part + i / loads;
        int d = column + i % loads * elements;
        uint4 raw = uint4(0);
        if (needed.has(position) && d < p.D) {
          raw =
              *(const device uint4*)(v + key_at(p, head, position, start) + d);
        }
        for (ushort j = 0; j < Loaded<T>::quads; ++j) {
          staged[i * Loaded<T>::quads + j] = Loaded<T>::quad(raw, j);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      Range own = any.within(part, part + staged_positions);
      auto quads = (const threadgroup float4*)weights;
      if (all.begin <= own.begin && own.end <= all.end) {
        weigh<true>(values, quads, staged, own, seen_by, lane);
      } else {
        weigh<false>(values, quads, staged, own, seen_by, lane);
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
[[kernel]] void block_attention_fold(
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
  int base = first_span(p, offset);
  Range seen = visible(p, position_of(p, offset, row));
  int first = seen.begin / span - base;
  int last = min((seen.end + span - 1) / span - base, p.spans);

  float4 total = 0.0f;
  float largest = 0.0f, sum = 0.0f;
  for (int i = first; i < last; ++i) {
    ulong state = (ulong(head) * p.spans + i) * R + row;
    float4 value = values[state * (p.D / 4) + thread_index];
    float next = states[state].x;
    float next_sum = states[state].y;
    if (i == first) {
      total = value;
      largest = next;
      sum = next_sum;
      continue;
    }
    // The side with the lower peak fades
    bool grows = next > largest;
    float fade = pyengine::exp(grows ? largest - next : next - largest);
    float keep = grows ? fade : 1.0f;
    float take = grows ? 1.0f : fade;
    total =
        product(total, keep, p.minus_zero) + product(value, take, p.minus_zero);
    sum = product(sum, keep, p.minus_zero) +
        product(next_sum, take, p.minus_zero);
    largest = grows ? next : largest;
  }
  float4 mean = total / sum;
  device T* to = out + row_at(p, head, row) + 4 * thread_index;
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
