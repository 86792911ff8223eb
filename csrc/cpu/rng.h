#pragma once
// rng.h: Philox 4x32 with 10 rounds, a random number as a function of a counter
// and a key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011), and the two ways a token is drawn with it.

#include <stdint.h>

#include "cpu/simd.h"

namespace pyengine::PYENGINE_ISA {

// The first of the four output words.
PYENGINE_INLINE uint32_t philox(
    uint32_t c0,
    uint32_t c1,
    uint32_t c2,
    uint32_t c3,
    uint32_t key0,
    uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53) * c0;
    uint64_t p1 = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(p0);
    key0 += 0x9E3779B9; // golden ratio
    key1 += 0xBB67AE85; // sqrt(3) - 1
  }
  return c0;
}

// The top 24 bits as a multiple of 2^-24 in [0, 1), exact in float32.
PYENGINE_INLINE float uniform(uint32_t word) {
  return float(int32_t(word >> 8)) * 0x1p-24f;
}

// Second word of the key: draws made for different ends never share a number.
enum class Purpose : uint32_t { plain, draft, accept, correct };

PYENGINE_INLINE float
uniform(uint32_t position, uint32_t lane, uint32_t seed, Purpose purpose) {
  return uniform(philox(position, lane, 0, 0, seed, uint32_t(purpose)));
}

// -log(1 - u) within one unit in the last place, for u from uniform().
//
// No fused operation, so that plain array operations repeat it bit for bit: a
// logarithm of the machine's own would now and then decide a race otherwise.
PYENGINE_INLINE F32x16 exponential(F32x16 u) {
  // log(1 + r) = r - r^2 / 2 + r^3 P(r) for r in [sqrt(1/2) - 1, sqrt(2) - 1];
  // our own fit, within 6e-9 of the result
  constexpr float c[] = {
      0.33333331f,
      -0.250008196f,
      0.200012311f,
      -0.166234031f,
      0.142017171f,
      -0.131597579f,
      0.12761618f,
      -0.0763554052f};
  constexpr int32_t sqrt_half = 0x3f3504f3; // its bits

  F32x16 v = broadcast(1.0f) - u;
  F32x16 r, e;
  PYENGINE_UNROLL
  for (int i = 0; i < parts; ++i) {
    NativeInt bits = detail::as_int(v.part[i]);
    NativeInt exponent = (bits - sqrt_half) >> 23;
    r.part[i] = detail::as_float(bits - (exponent << 23));
    e.part[i] = __builtin_convertvector(exponent, NativeFloat);
  }
  r = r - broadcast(1.0f);
  F32x16 y = broadcast(c[7]);
  PYENGINE_UNROLL
  for (int i = 6; i >= 0; --i) {
    y = y * r + broadcast(c[i]);
  }
  F32x16 r2 = r * r;
  y = y * r * r2 - broadcast(0.5f) * r2;
  F32x16 high = e * broadcast(0.693359375f); // log(2) in two parts
  F32x16 low = e * broadcast(-2.12194440e-4f);
  return zero() - (high + (r + (y + low)));
}

// The candidate with the smallest exponential time over its probability; of
// equals, the first. Its noise depends on position and id alone.
PYENGINE_INLINE int32_t race(
    const int32_t* ids,
    const float* probs,
    int count,
    uint32_t position,
    uint32_t seed) {
  float best = __builtin_inff();
  int32_t winner = ids[0];
  for (int begin = 0; begin < count; begin += lanes) {
    int width = count - begin < lanes ? count - begin : lanes;
    float u[lanes] = {};
    for (int i = 0; i < width; ++i) {
      u[i] = uniform(position, uint32_t(ids[begin + i]), seed, Purpose::plain);
    }
    float times[lanes];
    store(times, exponential(load(u)));
    for (int i = 0; i < width; ++i) {
      float p = probs[begin + i];
      float finish = p > 0 ? times[i] / p : __builtin_inff();
      if (finish < best) {
        best = finish;
        winner = ids[begin + i];
      }
    }
  }
  return winner;
}

// The first candidate whose mass, summed from the first on, exceeds u of the
// whole. The whole itself counts, for a mass so small that u times it rounds up
// to it.
PYENGINE_INLINE int32_t
invert(const int32_t* ids, const float* weights, int count, float u) {
  float whole = 0;
  for (int i = 0; i < count; ++i) {
    whole += weights[i];
  }
  float mass = 0;
  for (int i = 0; i < count; ++i) {
    mass += weights[i];
    if (mass > u * whole || mass == whole) {
      return ids[i];
    }
  }
  return ids[0]; // NaN
}

} // namespace pyengine::PYENGINE_ISA
