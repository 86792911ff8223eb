#pragma once
// mathfn_cpu.h: the functions of mathfn.h over an array, for their tests.

#include "cpu/kernel.h"

namespace pyengine {

enum class Function : uint8_t { exp, tanh, sin, cos };

PYENGINE_DECLARE_KERNEL(
    apply_function,
    Function function,
    const float* x,
    float* out,
    int64_t count)

} // namespace pyengine
