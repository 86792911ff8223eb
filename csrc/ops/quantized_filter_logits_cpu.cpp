// quantized_filter_logits_cpu: some columns of quantized_matmul, capped and
// filtered while they are in the cache. The same functions as in the three ops,
// so the bits are theirs.

#include "ops/quantized_filter_logits_cpu.h"

#include "cpu/filter.h"
#include "ops/softcap_cpu.h"

namespace pyengine::PYENGINE_ISA {

void quantized_filter_logits_columns(
    const QuantizedFilterLogitsArgs& args,
    int begin,
    int end,
    float* scratch,
    Kept* kept) {
  int columns = end - begin;
  quantized_matmul_sums(args.matmul, begin, end, scratch);
  for (int m = 0; m < args.matmul.M; ++m) {
    float* logits = scratch + m * columns;
    if (args.softcap > 0) {
      softcap_range(logits, logits, columns, args.softcap);
    }
    keep(args.filter, args.first + m, logits, begin, columns, kept[m]);
  }
}

void quantized_filter_logits_finish(
    const QuantizedFilterLogitsArgs& args,
    Kept* kept,
    int heaps) {
  int M = args.matmul.M;
  for (int m = 0; m < M; ++m) {
    int count = args.filter.count_of(args.first + m);
    for (int heap = 1; heap < heaps; ++heap) {
      merge(count, kept[heap * M + m], kept[m]);
    }
    finish(args.filter, args.first + m, kept[m]);
  }
}

} // namespace pyengine::PYENGINE_ISA
