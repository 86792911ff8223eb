#pragma once
// rng.h: Philox 4x32 with 10 rounds, a random number as a function of a counter
// and a key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011).

#include <stdint.h>

#include "simd.h"

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

} // namespace pyengine::PYENGINE_ISA
