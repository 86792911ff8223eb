#pragma once
// isa.h: the instruction set the processor kernels run with.

#include <string>
#include <vector>

#include "kernel.h"

namespace pyengine {

// Position of the chosen set in instruction_sets(), slowest first.
int instruction_set();

// Names of the sets that this build has and this machine can run.
const std::vector<std::string>& instruction_sets();

// For tests that compare sets; std::invalid_argument for an unknown name.
void use_instruction_set(const std::string& name);

template <typename Kernel>
Kernel* pick(Kernel* portable, Kernel* avx2, Kernel* avx512) {
  Kernel* const kernels[] = {portable, avx2, avx512};
  return kernels[instruction_set()];
}

} // namespace pyengine
