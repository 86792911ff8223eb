#pragma once
// glu_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

enum class Activation { gelu, silu };

struct GluArgs {
  const void* gate; // [size], storage
  const void* up;
  void* out;
  Storage storage;
  Activation activation;
};

PYENGINE_DECLARE_ROWS(glu_range, GluArgs)

} // namespace pyengine
