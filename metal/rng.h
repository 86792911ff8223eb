#pragma once
// rng.h: Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", 2011), and the two ways in which a simdgroup draws a
// token. The same numbers and the same decisions as csrc/cpu/rng.h, bit for
// bit.

#include "ordered_sum.h"

namespace pyengine {

// The first of the four output words.
inline uint philox(uint4 c, uint2 key) {
  for (ushort round = 0; round < 10; ++round) {
    uint high0 = mulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    uint high1 = mulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = uint4(high1 ^ c.y ^ key.x, low1, high0 ^ c.w ^ key.y, low0);
    key += uint2(0x9E3779B9u, 0xBB67AE85u); // golden ratio, sqrt(3) - 1
  }
  return c.x;
}

// The top 24 bits as a multiple of 2^-24 in [0, 1), exact in float32.
inline float uniform_of(uint word) {
  return float(word >> 8) * 5.96046448e-8f;
}

// Second word of the key: draws made for different ends never share a number.
enum class Purpose : uint { plain, draft, accept, correct };

inline float uniform_at(uint position, uint index, uint seed, Purpose purpose) {
  return uniform_of(
      philox(uint4(position, index, 0, 0), uint2(seed, uint(purpose))));
}

// -log(1 - u) within one unit in the last place, for u from uniform_of(). No
// fused operation, as in csrc/cpu/rng.h, which has the reasons.
inline float exponential(float u, float minus_zero) {
  int bits = as_type<int>(1.0f - u);
  int exponent = (bits - 0x3f3504f3) >> 23; // bits of sqrt(1/2)
  float r = as_type<float>(bits - (exponent << 23)) - 1.0f;
  float e = float(exponent);
  float y = -0.0763554052f;
  y = product(y, r, minus_zero) + 0.12761618f;
  y = product(y, r, minus_zero) + -0.131597579f;
  y = product(y, r, minus_zero) + 0.142017171f;
  y = product(y, r, minus_zero) + -0.166234031f;
  y = product(y, r, minus_zero) + 0.200012311f;
  y = product(y, r, minus_zero) + -0.250008196f;
  y = product(y, r, minus_zero) + 0.33333331f;
  float r2 = product(r, r, minus_zero);
  y = product(product(y, r, minus_zero), r2, minus_zero) -
      product(0.5f, r2, minus_zero);
  float high = product(e, 0.693359375f, minus_zero); // log(2) in two parts
  float low = product(e, -2.12194440e-4f, minus_zero);
  return 0.0f - (high + (r + (y + low)));
}

// The candidate with the smallest exponential time over its probability; of
// equals, the first. Its noise depends on position and id alone.
inline int race(
    const device int* ids,
    const device float* probs,
    uint count,
    uint position,
    uint seed,
    float minus_zero,
    ushort lane) {
  float best = INFINITY;
  uint at = 0;
  for (uint i = lane; i < count; i += 32) {
    float u = uniform_at(position, uint(ids[i]), seed, Purpose::plain);
    float p = probs[i];
    float finish = p > 0.0f ? exponential(u, minus_zero) / p : INFINITY;
    if (finish < best) {
      best = finish;
      at = i;
    }
  }
  float first = simd_min(best);
  return ids[simd_min(best == first ? at : 0xffffffffu)];
}

// The first candidate whose mass, summed from the first on, exceeds u of the
// whole. The whole itself counts, for a mass so small that u times it rounds up
// to it. A lane reads only weights lane, lane + 32, ...
template <typename Weights>
inline int invert(
    const device int* ids,
    Weights weights,
    uint count,
    float u,
    ushort lane) {
  float before;
  float whole = 0.0f;
  for (uint base = 0; base < count; base += 32) {
    float weight = base + lane < count ? weights[base + lane] : 0.0f;
    whole = add_in_order(whole, weight, before, lane);
  }
  float mass = 0.0f;
  for (uint base = 0; base < count; base += 32) {
    uint i = base + lane;
    float weight = i < count ? weights[i] : 0.0f;
    mass = add_in_order(mass, weight, before, lane);
    float own = before + weight;
    bool passed = i < count && (own > u * whole || own == whole);
    uint first = simd_min(passed ? i : 0xffffffffu);
    if (first < count) {
      return ids[first];
    }
  }
  return ids[0]; // NaN
}

} // namespace pyengine
