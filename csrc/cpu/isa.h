#pragma once
// isa.h: the instruction set the processor kernels run with.

#include <string>
#include <vector>

#include "cpu/kernel.h"

namespace pyengine {

// Position of the chosen set in instruction_sets(), slowest first.
int instruction_set();

// Names of the sets that this build has and this machine can run.
const std::vector<std::string>& instruction_sets();

// For tests that compare sets; std::invalid_argument for an unknown name.
void use_instruction_set(const std::string& name);

// One kernel of each of instruction_sets(), in their order.
template <typename Kernel, typename... Others>
Kernel* pick(Kernel* portable, Others*... others) {
  Kernel* const kernels[] = {portable, others...};
  return kernels[instruction_set()];
}

} // namespace pyengine
