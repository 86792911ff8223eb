// filter_logits_cpu: rows of logits through filter.h. Without top-k every logit
// is a candidate, and the row is sorted by digits.

#include "ops/filter_logits_cpu.h"

#include "cpu/filter.h"

namespace pyengine::PYENGINE_ISA {

namespace {

PYENGINE_INLINE uint32_t key_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits >> 31 ? bits : bits ^ 0x7fffffff;
}

PYENGINE_INLINE float value_of(uint32_t key) {
  uint32_t bits = key >> 31 ? key : key ^ 0x7fffffff;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// All logits of a row, best first: a radix sort, stable, so ids break ties.
const SortKey* sort_all(int V, Reader& reader, SortKey* scratch) {
  constexpr int digit_bits = 11;
  constexpr int buckets = 1 << digit_bits;
  SortKey* from = scratch;
  SortKey* to = from + V;
  int starts[3][buckets] = {};
  float group[lanes];
  for (int id = 0; id < V; id += lanes) {
    store(group, reader.group(id));
    int width = V - id < lanes ? V - id : lanes;
    for (int i = 0; i < width; ++i) {
      uint32_t key = key_of(group[i]);
      from[id + i] = {key, id + i};
      for (int digit = 0; digit < 3; ++digit) {
        ++starts[digit][(key >> (digit * digit_bits)) & (buckets - 1)];
      }
    }
  }
  for (int digit = 0; digit < 3; ++digit) {
    int begin = 0;
    for (int& start : starts[digit]) {
      int size = start;
      start = begin;
      begin += size;
    }
    for (int i = 0; i < V; ++i) {
      uint32_t bucket = (from[i].key >> (digit * digit_bits)) & (buckets - 1);
      to[starts[digit][bucket]++] = from[i];
    }
    SortKey* sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

} // namespace

void filter_logits_rows(
    const FilterLogitsArgs& args,
    int64_t begin,
    int64_t end) {
  const FilterArgs& filter = args.filter;
  int V = filter.V;
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = args.logits + row * V;
    if (filter.n <= max_candidates) {
      Kept kept = {};
      keep(filter, row, logits, 0, V, kept);
      finish(filter, row, kept);
    } else {
      Reader reader(filter, row, logits, 0, V, 0);
      const SortKey* sorted = sort_all(V, reader, args.scratch);
      for (int i = 0; i < filter.count_of(row); ++i) {
        filter.ids[row * V + i] = sorted[i].id;
        filter.probs[row * V + i] = value_of(sorted[i].key);
      }
      finish(filter, row, reader.flag());
    }
  }
}

} // namespace pyengine::PYENGINE_ISA
