// random_uniform_cpu: counters are independent, so the compiler may take as
// many at a time as it likes.

#include "ops/random_uniform_cpu.h"

#include "cpu/rng.h"

namespace pyengine::PYENGINE_ISA {

void random_uniform_rows(
    const RandomUniformArgs& args,
    int64_t begin,
    int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t* c = args.counters + 4 * i;
    args.out[i] = uniform(philox(c[0], c[1], c[2], c[3], args.key0, args.key1));
  }
}

} // namespace pyengine::PYENGINE_ISA
