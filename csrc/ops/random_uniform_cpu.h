#pragma once
// random_uniform_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct RandomUniformArgs {
  const uint32_t* counters; // [count, 4]
  float* out; // [count]
  uint32_t key0;
  uint32_t key1;
};

PYENGINE_DECLARE_ROWS(random_uniform_rows, RandomUniformArgs)

} // namespace pyengine
