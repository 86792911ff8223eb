#pragma once
// draw_token_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct DrawTokenArgs {
  const int32_t* ids; // [rows, count]
  const float* probs; // [rows, count]
  const int32_t* position; // [rows], as all below
  const int32_t* index;
  const uint32_t* seed;
  const bool* shared;
  int32_t* out;
  int count;
};

PYENGINE_DECLARE_ROWS(draw_token_rows, DrawTokenArgs)

} // namespace pyengine
