#pragma once
// softcap_cpu.h: the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

// x and out may be the same.
PYENGINE_DECLARE_KERNEL(
    softcap_range,
    const float* x,
    float* out,
    int64_t count,
    float cap)

} // namespace pyengine
