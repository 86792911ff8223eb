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

PYENGINE_DECLARE_KERNEL(
    geglu_range,
    const GegluArgs& args,
    int64_t begin,
    int64_t end)

} // namespace pyengine
