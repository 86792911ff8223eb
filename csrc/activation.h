#pragma once
// activation.h: the functions that gate, by their names.

#include <string>

#include "check.h"
#include "ops/glu_cpu.h"

namespace pyengine {

inline Activation activation_of(const char* op, const std::string& name) {
  bool silu = name == "silu";
  check(silu || name == "gelu", op, "activation", "be gelu or silu", name);
  return silu ? Activation::silu : Activation::gelu;
}

} // namespace pyengine
