#pragma once
// weigh_experts_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct WeighExpertsArgs {
  const float* parts; // [rows, used, E]
  const float* weights; // [rows, used]
  void* out; // [rows, E]
  Storage storage; // of out
  int used;
  int E;
};

PYENGINE_DECLARE_ROWS(weigh_experts_rows, WeighExpertsArgs)

} // namespace pyengine
