#pragma once
// rms_norm_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct RmsNormArgs {
  const void* x; // [rows, D], storage
  const void* weight; // [D], storage, or null
  void* out; // [rows, D], storage
  Storage storage;
  int D;
  float eps;
};

PYENGINE_DECLARE_ROWS(rms_norm_rows, RmsNormArgs)

} // namespace pyengine
