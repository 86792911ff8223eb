#pragma once
// geglu_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct GegluArgs {
  const void* gate; // [size], storage
  const void* up;
  void* out;
  Storage storage;
};

PYENGINE_DECLARE_ROWS(geglu_range, GegluArgs)

} // namespace pyengine
