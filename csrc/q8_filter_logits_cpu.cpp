// q8_filter_logits_cpu: some columns of q8_matmul, capped and filtered while
// they are in the cache. The same functions as in the three ops, so the bits
// are theirs.

#include "q8_filter_logits_cpu.h"

#include "filter.h"
#include "softcap_cpu.h"

namespace pyengine::PYENGINE_ISA {

void q8_filter_logits_columns(
    const Q8FilterLogitsArgs& args,
    int begin,
    int end,
    float* scratch,
    Kept* kept) {
  int columns = end - begin;
  q8_matmul_sums(args.matmul, begin, end, scratch);
  for (int m = 0; m < args.matmul.M; ++m) {
    float* logits = scratch + m * columns;
    if (args.softcap > 0) {
      softcap_range(logits, logits, columns, args.softcap);
    }
    keep(args.filter, args.first + m, logits, begin, columns, kept[m]);
  }
}

void q8_filter_logits_finish(
    const Q8FilterLogitsArgs& args,
    Kept* kept,
    int heaps) {
  int M = args.matmul.M;
  for (int m = 0; m < M; ++m) {
    for (int heap = 1; heap < heaps; ++heap) {
      merge(args.filter, kept[heap * M + m], kept[m]);
    }
    finish(args.filter, args.first + m, kept[m]);
  }
}

} // namespace pyengine::PYENGINE_ISA
