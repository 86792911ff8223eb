// draw_token_cpu: rows are independent; each is a race or an inversion.

#include "ops/draw_token_cpu.h"

#include "cpu/rng.h"

namespace pyengine::PYENGINE_ISA {

void draw_token_rows(const DrawTokenArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* ids = args.ids + row * args.count;
    const float* probs = args.probs + row * args.count;
    uint32_t position = uint32_t(args.position[row]);
    uint32_t index = uint32_t(args.index[row]);
    uint32_t seed = args.seed[row];
    args.out[row] = args.shared[row]
        ? race(ids, probs, args.count, position + index, seed)
        : invert(
              ids,
              probs,
              args.count,
              uniform(position, index, seed, Purpose::draft));
  }
}

} // namespace pyengine::PYENGINE_ISA
