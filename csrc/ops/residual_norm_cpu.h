#pragma once
// residual_norm_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct ResidualNormArgs {
  const void* h; // [rows, E], storage, as all below
  const void* y; // [rows, E]
  const void* weight; // [E]
  const void* scalar; // [1] or null
  const void* next_weight; // [E] or null
  void* sum; // [rows, E]
  void* next; // [rows, E], null with next_weight
  Storage storage;
  int E;
  float eps;
};

PYENGINE_DECLARE_ROWS(residual_norm_rows, ResidualNormArgs)

} // namespace pyengine
