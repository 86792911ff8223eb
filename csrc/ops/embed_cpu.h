#pragma once
// embed_cpu.h: arguments of the processor kernel.

#include "cpu/kernel.h"

namespace pyengine {

struct EmbedArgs {
  const int32_t* ids; // [rows]
  const void* w; // [V, E] in `storage`, or [V, E * bits / 8] bytes
  const void* scales; // [V, E / group_size] in `storage`
  const void* biases;
  Storage storage;
  void* out; // [rows, E]
  Storage out_storage;
  int V;
  int E;
  int group_size;
  int bits; // 0 for a table of floats
  float scale;
};

PYENGINE_DECLARE_ROWS(embed_rows, EmbedArgs)

} // namespace pyengine
