// accept_block: how many drafts of each of several blocks are kept, and the
// tokens that follow them, in one threadgroup per block.
//
// Block s has rows starts[s] to starts[s + 1] - 1 of p and one fewer of q, for
// its last row has no draft. Its rule is the same for all threads.
//
// A simdgroup takes a row: it looks up the draft in the candidates of p and q,
// and adds the mass of (scale * p - q)+ over p's candidates in their order.
// Between rows there is only the running product of `block`, k steps of one
// thread. The first simdgroup then decides, and draws.
//
// A candidate of p finds its partner in q by looking at all m: with 64 of each,
// 128 loads per lane and row, all from the cache.
//
// Limits: k at most 128 in each block; n at most 256.
#include "rng.h"

namespace pyengine {

constant constexpr ushort max_drafts = 128;
constant constexpr ushort max_count = 256;
constant constexpr int residual = 0, block = 1; // 2 is coupled

// Candidates of one row.
struct Row {
  const device int* ids;
  const device float* probs;
  uint count;

  // Of one token, asked for by all lanes; 0 for what is no candidate.
  float probability(int token, ushort lane) const {
    uint at = count;
    for (uint i = lane; i < count && at == count; i += 32) {
      at = ids[i] == token ? i : at;
    }
    at = simd_min(at);
    return at < count ? probs[at] : 0.0f;
  }

  // Of this lane's token.
  float probability(int token) const {
    uint at = count;
    for (uint i = 0; i < count; ++i) {
      at = at == count && ids[i] == token ? i : at;
    }
    return at < count ? probs[at] : 0.0f;
  }
};

struct Rows {
  const device int* ids;
  const device float* probs;
  uint count;

  Row row(uint i) const {
    return {ids + i * count, probs + i * count, count};
  }

  Rows from(uint i) const {
    return {ids + ulong(i) * count, probs + ulong(i) * count, count};
  }
};

// min(1, p / q); 0 where p is.
inline float ratio(float p, float q) {
  float r = p / q;
  r = r < 1.0f ? r : 1.0f;
  return p > 0.0f ? r : 0.0f;
}

// (scale * p - q)+ of this lane's candidate, 0 past the last. An id outside of
// the vocabulary has no q.
inline float
excess_of(Row p, Row q, uint i, float scale, uint vocab, float minus_zero) {
  if (i >= p.count) {
    return 0.0f;
  }
  float other = uint(p.ids[i]) < vocab ? q.probability(p.ids[i]) : 0.0f;
  float excess = product(scale, p.probs[i], minus_zero) - other;
  return excess > 0.0f ? excess : 0.0f;
}

[[host_name(
    "accept_block")]] [[kernel, max_total_threads_per_threadgroup(512)]] void
accept_block(
    const device int* p_ids [[buffer(0)]], // [R, n]
    const device float* p_probs [[buffer(1)]], // [R, n]
    const device int* q_ids [[buffer(2)]], // [R - Q, m]
    const device float* q_probs [[buffer(3)]], // [R - Q, m]
    const device int* all_drafts [[buffer(4)]], // [R - Q]
    const device int* positions [[buffer(5)]], // [Q]
    const device uint* seeds [[buffer(6)]], // [Q]
    const device int* rules [[buffer(7)]], // [Q]
    device int* accepted_out [[buffer(8)]], // [Q]
    device int* next [[buffer(9)]], // [Q]
    constant uint* starts [[buffer(10)]], // [Q + 1]
    constant uint& n [[buffer(11)]],
    constant uint& m [[buffer(12)]],
    constant uint& vocab [[buffer(13)]],
    constant float& minus_zero [[buffer(14)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  // Probabilities of the drafts
  threadgroup float p_drafts[max_drafts], q_drafts[max_drafts];
  threadgroup float scales[max_drafts + 1]; // of the row after i drafts
  threadgroup float chances[max_drafts];
  threadgroup int tokens[max_drafts + 1];
  threadgroup float weights[max_count];
  uint own = group.x;
  uint first = starts[own];
  uint k = starts[own + 1] - first - 1;
  Rows p = Rows{p_ids, p_probs, n}.from(first);
  Rows q = Rows{q_ids, q_probs, m}.from(first - own);
  const device int* drafts = all_drafts + (first - own);
  uint position = uint(positions[own]);
  uint seed = seeds[own];
  int rule = rules[own];

  // A block without drafts is a step of plain decoding, as the last row here
  if (k == 0 || (rule != residual && rule != block)) {
    for (uint i = simd; i <= k; i += simds) {
      Row row = p.row(i);
      int token =
          race(row.ids, row.probs, n, position + 1 + i, seed, minus_zero, lane);
      if (lane == 0) {
        tokens[i] = token;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simd > 0) {
      return;
    }
    uint accepted = k;
    for (uint i = lane; i < k; i += 32) {
      accepted = tokens[i] != drafts[i] ? min(accepted, i) : accepted;
    }
    accepted = simd_min(accepted);
    if (lane == 0) {
      accepted_out[own] = int(accepted);
      next[own] = tokens[accepted];
    }
    return;
  }

  // Look up the drafts
  for (uint i = simd; i < k; i += simds) {
    float target = p.row(i).probability(drafts[i], lane);
    float assistant = q.row(i).probability(drafts[i], lane);
    if (lane == 0) {
      p_drafts[i] = target;
      q_drafts[i] = assistant;
      chances[i] = ratio(target, assistant);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (rule == block) {
    if (simd == 0 && lane == 0) {
      float scale = 1.0f;
      scales[0] = scale;
      for (uint i = 0; i < k; ++i) {
        scale = ratio(scale * p_drafts[i], q_drafts[i]);
        scales[i + 1] = scale;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 1 + simd; i <= k; i += simds) {
      float chance = scales[i];
      if (i < k) {
        float before, mass = 0.0f;
        for (uint base = 0; base < n; base += 32) {
          float excess = excess_of(
              p.row(i), q.row(i), base + lane, scales[i], vocab, minus_zero);
          mass = add_in_order(mass, excess, before, lane);
        }
        float whole = mass + (1.0f - scales[i]);
        chance = whole > 0.0f ? mass / whole : 1.0f;
      }
      if (lane == 0) {
        chances[i - 1] = chance;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (simd > 0) {
    return;
  }

  // Decide: up to the first failure, or to the last success
  uint accepted = rule == block ? 0 : k;
  for (uint i = lane; i < k; i += 32) {
    bool passed = uniform_at(position, i, seed, Purpose::accept) < chances[i];
    if (rule == block) {
      accepted = passed ? i + 1 : accepted;
    } else {
      accepted = passed ? accepted : min(accepted, i);
    }
  }
  accepted = rule == block ? simd_max(accepted) : simd_min(accepted);

  // Draw what follows
  Row row = p.row(accepted);
  float mass = 0.0f;
  if (accepted < k) {
    float before, scale = rule == block ? scales[accepted] : 1.0f;
    for (uint base = 0; base < n; base += 32) {
      uint i = base + lane;
      float excess =
          excess_of(row, q.row(accepted), i, scale, vocab, minus_zero);
      mass = add_in_order(mass, excess, before, lane);
      if (i < n) {
        weights[i] = excess;
      }
    }
  }
  float u = uniform_at(position, accepted, seed, Purpose::correct);
  int token = mass > 0.0f
      ? invert(row.ids, (const threadgroup float*)weights, n, u, lane)
      : invert(row.ids, row.probs, n, u, lane);
  if (lane == 0) {
    accepted_out[own] = int(accepted);
    next[own] = token;
  }
}

} // namespace pyengine
