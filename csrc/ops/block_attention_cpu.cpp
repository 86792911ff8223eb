// block_attention_cpu: a chunk of 64 keys and values stays in the cache while
// all rows of the block pass over it, four rows at a time.

#include "ops/block_attention_cpu.h"

#include "../metal/positions.h"
#include "cpu/lanes.h"
#include "cpu/mathfn.h"

namespace pyengine::PYENGINE_ISA {

namespace {

constexpr int chunk = attention_chunk;
static_assert(chunk == page_size);
constexpr int tile = 4; // rows that share each load of a key or value

// Keys per pass over D and vectors of D per pass over keys: as many
// accumulators as the registers hold. Neither changes an order of summation.
constexpr int tile_keys = parts == 1 ? 4 : 1;
template <int ROWS>
constexpr int tile_vectors = parts > 1 ? 1
    : ROWS == 1                        ? 16
    : ROWS == 2                        ? 8
                                       : 4;

// Keys and values of many sequences come from memory, and several rows of a
// page are read at a time, which no processor foresees. So each is asked for
// this many rows before its turn.
constexpr int ahead = 8;

struct State {
  float* largest; // [R]
  float* sum; // [R]
  float* values; // [R, D]

  State(float* memory, int R)
      : largest(memory),
        sum(memory + R),
        values(memory + 2 * R) {}
};

// Visible positions of one row within the chunk.
struct Range {
  int begin;
  int end;
};

template <typename T>
PYENGINE_INLINE void prefetch(const T* from, int count) {
  constexpr int line = 64 / sizeof(T);
  for (int d = 0; d < count; d += line) {
    __builtin_prefetch(from + d);
  }
}

// scores[r, j] = scale * q[r] . keys[j]; one accumulator for each, lane by lane
// over D.
template <int ROWS, int KEYS, typename T>
PYENGINE_INLINE void score_tile(
    const float* q,
    const T* const* keys,
    int D,
    float scale,
    float* scores) {
  F32x16 dot[ROWS][KEYS] = {};
  for (int d = 0; d < D; d += lanes) {
    F32x16 key[KEYS];
    PYENGINE_UNROLL
    for (int j = 0; j < KEYS; ++j) {
      key[j] = load(keys[j] + d);
    }
    PYENGINE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      F32x16 query = load(q + r * D + d);
      PYENGINE_UNROLL
      for (int j = 0; j < KEYS; ++j) {
        dot[r][j] = fma(query, key[j], dot[r][j]);
      }
    }
  }
  PYENGINE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    float sums[KEYS];
    if constexpr (KEYS == 4) {
      sum(dot[r][0], dot[r][1], dot[r][2], dot[r][3], sums);
    } else {
      PYENGINE_UNROLL
      for (int j = 0; j < KEYS; ++j) {
        sums[j] = sum(dot[r][j]);
      }
    }
    PYENGINE_UNROLL
    for (int j = 0; j < KEYS; ++j) {
      scores[r * chunk + j] = scale * sums[j];
    }
  }
}

template <int ROWS, typename T>
void score_rows(
    const float* q,
    const T* const* keys,
    Range range,
    int D,
    float scale,
    float* scores) {
  int j = range.begin;
  for (; j + tile_keys <= range.end; j += tile_keys) {
    int next = j + ahead;
    for (int i = next; i < next + tile_keys && i < range.end; ++i) {
      prefetch(keys[i], D);
    }
    score_tile<ROWS, tile_keys>(q, keys + j, D, scale, scores + j);
  }
  for (; j < range.end; ++j) {
    score_tile<ROWS, 1>(q, keys + j, D, scale, scores + j);
  }
}

// values[r] += weights[r, j] * v[j] for j in range, one position after another.
template <int ROWS, int VECTORS, typename T>
PYENGINE_INLINE void weigh_tile(
    const float* weights,
    const T* const* v,
    Range range,
    int d,
    int D,
    float* values) {
  F32x16 total[ROWS][VECTORS];
  PYENGINE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    PYENGINE_UNROLL
    for (int i = 0; i < VECTORS; ++i) {
      total[r][i] = load(values + r * D + d + i * lanes);
    }
  }
  for (int j = range.begin; j < range.end; ++j) {
    if (j + ahead < range.end) {
      prefetch(v[j + ahead] + d, VECTORS * lanes);
    }
    F32x16 value[VECTORS];
    PYENGINE_UNROLL
    for (int i = 0; i < VECTORS; ++i) {
      value[i] = load(v[j] + d + i * lanes);
    }
    PYENGINE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      F32x16 weight = broadcast(weights[r * chunk + j]);
      PYENGINE_UNROLL
      for (int i = 0; i < VECTORS; ++i) {
        total[r][i] = fma(weight, value[i], total[r][i]);
      }
    }
  }
  PYENGINE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    PYENGINE_UNROLL
    for (int i = 0; i < VECTORS; ++i) {
      store(values + r * D + d + i * lanes, total[r][i]);
    }
  }
}

template <int ROWS, typename T>
void weigh_rows(
    const float* weights,
    const T* const* v,
    Range range,
    int D,
    float* values) {
  if (range.begin >= range.end) {
    return;
  }
  constexpr int vectors = tile_vectors<ROWS>;
  int d = 0;
  for (; d + vectors * lanes <= D; d += vectors * lanes) {
    weigh_tile<ROWS, vectors>(weights, v, range, d, D, values);
  }
  for (; d < D; d += lanes) {
    weigh_tile<ROWS, 1>(weights, v, range, d, D, values);
  }
}

PYENGINE_INLINE float lane0(F32x16 a) {
  float t[lanes];
  store(t, a);
  return t[0];
}

// Fades one row's state from its old largest score to a new one.
PYENGINE_INLINE void fade_row(State state, int row, int D, float largest) {
  F32x16 factor = exp(broadcast(state.largest[row] - largest));
  float* values = state.values + int64_t(row) * D;
  for (int d = 0; d < D; d += lanes) {
    store(values + d, load(values + d) * factor);
  }
  state.sum[row] *= lane0(factor);
  state.largest[row] = largest;
}

// Turns one row's scores of a chunk into weights and adds their sum.
void soften_row(float* scores, Range range, State state, int row, int D) {
  for (int j = 0; j < chunk; ++j) {
    if (j < range.begin || j >= range.end) {
      scores[j] = -__builtin_inff(); // weighs exactly 0
    }
  }
  F32x16 s[chunk / lanes];
  F32x16 most = broadcast(-__builtin_inff());
  PYENGINE_UNROLL
  for (int i = 0; i < chunk / lanes; ++i) {
    s[i] = load(scores + i * lanes);
    most = max(s[i], most);
  }
  float largest = max(most);
  if (state.sum[row] == 0.0f) {
    state.largest[row] = largest;
  } else if (largest > state.largest[row]) {
    fade_row(state, row, D, largest);
  }
  PYENGINE_UNROLL
  for (int i = 0; i < chunk / lanes; ++i) {
    s[i] = exp(s[i] - broadcast(state.largest[row]));
    store(scores + i * lanes, s[i]);
  }
  state.sum[row] += sum((s[0] + s[1]) + (s[2] + s[3]));
}

// A chunk's keys and values, by position within it.
template <typename T>
struct Chunk {
  const T* k[chunk];
  const T* v[chunk];
};

template <int ROWS, typename T>
void attend_rows(
    const BlockAttentionArgs& args,
    const float* q,
    const Chunk<T>& from,
    const Range* seen, // [ROWS], none empty
    State state,
    int row) {
  int D = args.D;
  Range any = seen[0];
  Range all = seen[0];
  for (int r = 1; r < ROWS; ++r) {
    any.begin = seen[r].begin < any.begin ? seen[r].begin : any.begin;
    any.end = seen[r].end > any.end ? seen[r].end : any.end;
    all.begin = seen[r].begin > all.begin ? seen[r].begin : all.begin;
    all.end = seen[r].end < all.end ? seen[r].end : all.end;
  }

  float scores[ROWS * chunk];
  score_rows<ROWS>(q + row * D, from.k, any, D, args.scale, scores);
  for (int r = 0; r < ROWS; ++r) {
    soften_row(scores + r * chunk, seen[r], state, row + r, D);
  }

  // A hidden value may be anything, NaN included, so no row may multiply it by
  // 0: what not every row sees is added row by row, in the same order.
  float* values = state.values + int64_t(row) * D;
  if (all.begin >= all.end) {
    for (int r = 0; r < ROWS; ++r) {
      weigh_rows<1>(scores + r * chunk, from.v, seen[r], D, values + r * D);
    }
    return;
  }
  for (int r = 0; r < ROWS; ++r) {
    Range before = {seen[r].begin, all.begin};
    weigh_rows<1>(scores + r * chunk, from.v, before, D, values + r * D);
  }
  weigh_rows<ROWS>(scores, from.v, all, D, values);
  for (int r = 0; r < ROWS; ++r) {
    Range after = {all.end, seen[r].end};
    weigh_rows<1>(scores + r * chunk, from.v, after, D, values + r * D);
  }
}

int group_size(const BlockAttentionArgs& args) {
  return args.H / args.K;
}

int64_t position_of(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    int row) {
  int i = row / group_size(args);
  return int64_t(rows.position) + (rows.depths ? rows.depths[i] : i);
}

// Positions that a row at `position` sees, cut to [from, to).
Range visible(
    const BlockAttentionArgs& args,
    int64_t position,
    int64_t from,
    int64_t to) {
  int64_t begin = position - args.window + 1;
  begin = begin < from ? from : begin > to ? to : begin;
  int64_t end = position + 1;
  end = end < begin ? begin : end > to ? to : end;
  return {int(begin - from), int(end - from)};
}

// The rows [row, end) to a chunk that begins at position `at`.
template <typename T>
void attend_chunk(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    const float* q32,
    const Chunk<T>& from,
    State state,
    int64_t at,
    int row,
    int end) {
  while (row < end) {
    Range seen[tile];
    int count = 0;
    for (; count < tile && row + count < end; ++count) {
      int64_t position = position_of(args, rows, row + count);
      seen[count] = visible(args, position, at, at + chunk);
      if (seen[count].begin >= seen[count].end) {
        break;
      }
    }
    switch (count) {
      case 4:
        attend_rows<4>(args, q32, from, seen, state, row);
        break;
      case 3:
        attend_rows<3>(args, q32, from, seen, state, row);
        break;
      case 2:
        attend_rows<2>(args, q32, from, seen, state, row);
        break;
      case 1:
        attend_rows<1>(args, q32, from, seen, state, row);
        break;
      default:
        count = 1; // this row sees nothing here
    }
    row += count;
  }
}

// The slot of a position that row i of a tree sees.
int64_t slot_of(const AttentionRows& rows, int i, int64_t position) {
  int64_t depth = position - rows.position;
  return depth < 0
      ? position
      : rows.position + rows.ancestors[int64_t(i) * rows.A + depth];
}

template <typename T>
void attend_span(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    const float* q32,
    int64_t span,
    float* memory) {
  int R = rows.positions * group_size(args);
  int D = args.D;
  State state(memory, R);
  for (int64_t i = 0; i < attention_state_size(R, D); ++i) {
    memory[i] = 0.0f;
  }
  auto* k = static_cast<const T*>(args.k) + rows.head * args.k_strides[1];
  auto* v = static_cast<const T*>(args.v) + rows.head * args.v_strides[1];

  for (int64_t at = span * attention_span; at < (span + 1) * attention_span;
       at += chunk) {
    // The first slot's row sees furthest back, the last one's furthest ahead.
    int64_t newest = int64_t(rows.position) + rows.positions - 1;
    int begin = visible(args, rows.position, at, at + chunk).begin;
    int end = visible(args, newest, at, at + chunk).end;
    if (begin >= end) {
      continue; // its page may be none
    }
    Chunk<T> from;
    auto point = [&](int j, int64_t page, int64_t place) {
      from.k[j] = k + page * args.k_strides[0] + place * args.k_strides[2];
      from.v[j] = v + page * args.v_strides[0] + place * args.v_strides[2];
    };
    auto page_of = [&](int64_t slot) {
      return rows.table[slot / chunk % args.N];
    };
    if (!rows.depths || at + chunk <= rows.position) {
      int64_t page = page_of(at);
      for (int j = begin; j < end; ++j) {
        point(j, page, j);
      }
      attend_chunk(args, rows, q32, from, state, at, 0, R);
      continue;
    }
    // Each row of a tree has keys of its own here
    int G = group_size(args);
    for (int i = 0; i < rows.positions; ++i) {
      Range seen =
          visible(args, position_of(args, rows, i * G), at, at + chunk);
      for (int j = seen.begin; j < seen.end; ++j) {
        int64_t slot = slot_of(rows, i, at + j);
        point(j, page_of(slot), slot % chunk);
      }
      attend_chunk(args, rows, q32, from, state, at, i * G, (i + 1) * G);
    }
  }
}

// Rows of q, or of out, from one position to the next and within a position.
template <typename Step>
void for_rows(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    const Step& step) {
  int G = group_size(args);
  for (int row = 0; row < rows.positions * G; ++row) {
    int64_t at = int64_t(rows.row) + row / G; // of q
    step(row, (at * args.H + rows.head * G + row % G) * args.D);
  }
}

} // namespace

void attention_load(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    float* q32) {
  with_storage(args.storage, [&]<typename T>(T*) {
    for_rows(args, rows, [&](int row, int64_t at) {
      auto* q = static_cast<const T*>(args.q) + at;
      for (int d = 0; d < args.D; d += lanes) {
        store(q32 + int64_t(row) * args.D + d, load(q + d));
      }
    });
  });
}

void attention_over_span(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    const float* q32,
    int64_t span,
    float* state) {
  with_storage(args.storage, [&]<typename T>(T*) {
    attend_span<T>(args, rows, q32, span, state);
  });
}

void attention_fold(int R, int D, float* total_memory, float* next_memory) {
  State total(total_memory, R);
  State next(next_memory, R);
  for (int row = 0; row < R; ++row) {
    if (next.sum[row] == 0.0f) {
      continue;
    }
    float* into = total.values + int64_t(row) * D;
    const float* from = next.values + int64_t(row) * D;
    if (total.sum[row] == 0.0f) {
      total.largest[row] = next.largest[row];
      total.sum[row] = next.sum[row];
      memcpy(into, from, D * sizeof(float));
      continue;
    }
    if (next.largest[row] > total.largest[row]) {
      fade_row(total, row, D, next.largest[row]);
    } else {
      fade_row(next, row, D, total.largest[row]);
    }
    total.sum[row] += next.sum[row];
    for (int d = 0; d < D; d += lanes) {
      store(into + d, load(into + d) + load(from + d));
    }
  }
}

void attention_finish(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    float* memory) {
  State state(memory, rows.positions * group_size(args));
  with_storage(args.storage, [&]<typename T>(T*) {
    for_rows(args, rows, [&](int row, int64_t at) {
      auto* out = static_cast<T*>(args.out) + at;
      const float* values = state.values + int64_t(row) * args.D;
      F32x16 sum = broadcast(state.sum[row]);
      for (int d = 0; d < args.D; d += lanes) {
        store(out + d, load(values + d) / sum);
      }
    });
  });
}

} // namespace pyengine::PYENGINE_ISA
