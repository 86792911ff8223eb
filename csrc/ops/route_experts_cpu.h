#pragma once
// route_experts_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct RouteExpertsArgs {
  const float* logits; // [rows, X]
  const float* scales; // [X]
  int32_t* ids; // [rows, used]
  float* weights; // [rows, used]
  int X;
  int used;
};

PYENGINE_DECLARE_ROWS(route_experts_rows, RouteExpertsArgs)

} // namespace pyengine
