// filter_logits_cpu: one pass over a row's logits keeps the best candidates in
// a heap whose top is the worst of them; the rest is work on those alone.
//
// Sixteen logits are looked at together: past the first few hundred, nearly
// all groups hold nothing better than the worst candidate and are passed over.
// Edits are few and sorted, so the pass puts them in as it meets their ids.
// Without top-k every logit is a candidate, and the row is sorted by digits.
// Sums run in the order of the candidates, as the definition wants.

#include "filter_logits_cpu.h"

#include "mathfn.h"

namespace pyengine::PYENGINE_ISA {

namespace {

struct Candidate {
  float value;
  int32_t id;
};

// Higher value first, then lower id.
PYENGINE_INLINE bool better(Candidate a, Candidate b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// heap[0] is the worst; moves `item` down from `at`.
void sift_down(Candidate* heap, int size, int at, Candidate item) {
  for (int child = 2 * at + 1; child < size; child = 2 * at + 1) {
    if (child + 1 < size && better(heap[child], heap[child + 1])) {
      ++child;
    }
    if (!better(item, heap[child])) {
      break;
    }
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = item;
}

// Hands out a row in groups of sixteen, edited and divided by the temperature,
// and notes whether every logit as given was finite.
class Reader {
 public:
  Reader(const FilterLogitsArgs& args, int64_t row)
      : args_(args),
        row_(args.logits + row * args.V),
        factors_(args.edit_factors + row * args.edits),
        deltas_(args.edit_deltas + row * args.edits),
        temperature_(broadcast(args.temperature)),
        zeros_(zero()) {}

  // Logits id to id + 15; -inf past the end. Calls come in rising order.
  PYENGINE_INLINE F32x16 group(int id) {
    float padded[lanes];
    const float* from = row_ + id;
    bool edited = next_ < args_.edits && edit_id() < id + lanes;
    if (args_.V - id < lanes || edited) [[unlikely]] {
      int width = args_.V - id < lanes ? args_.V - id : lanes;
      zeros_ = zeros_ + load(from, width) * zero();
      store(padded, broadcast(-__builtin_inff()));
      memcpy(padded, from, width * sizeof(float));
      for (; next_ < args_.edits && edit_id() < id + lanes; ++next_) {
        int lane = edit_id() - id;
        if (lane >= 0 && lane < width) {
          padded[lane] = edited_value(from[lane], args_.edit_order[next_]);
        }
      }
      from = padded;
    } else {
      zeros_ = zeros_ + load(from) * zero();
    }
    // -0 + 0 is 0: the two are the same logit
    return load(from) / temperature_ + zero();
  }

  // 0: all finite; 1: some -inf; 2: NaN, +inf, or no candidate at all.
  int32_t flag(float best) const {
    if (!(best - best == 0)) {
      return 2;
    }
    float sums[lanes];
    store(sums, zeros_);
    bool finite = true;
    for (float sum : sums) {
      finite &= sum == 0;
    }
    if (finite) {
      return 0;
    }
    for (int id = 0; id < args_.V; ++id) {
      if (!(row_[id] < __builtin_inff())) {
        return 2;
      }
    }
    return 1;
  }

 private:
  int edit_id() const {
    return args_.edit_ids[args_.edit_order[next_]];
  }

  float edited_value(float logit, int at) const {
    float factor = factors_[at];
    return (logit > 0 ? logit / factor : logit * factor) + deltas_[at];
  }

  const FilterLogitsArgs& args_;
  const float* row_;
  const float* factors_;
  const float* deltas_;
  F32x16 temperature_;
  F32x16 zeros_; // finite * 0 is 0, anything else NaN
  int next_ = 0;
};

// The best args.count of a row, best first.
void select(const FilterLogitsArgs& args, Reader& reader, Candidate* kept) {
  int count = args.count;
  int size = 0;
  float group[lanes];
  for (int id = 0; id < args.V; id += lanes) {
    F32x16 scaled = reader.group(id);
    if (size == count && !(max(scaled) > kept[0].value)) {
      continue;
    }
    store(group, scaled);
    int width = args.V - id < lanes ? args.V - id : lanes;
    for (int i = 0; i < width; ++i) {
      Candidate item = {group[i], id + i};
      if (size < count) {
        kept[size++] = item;
        for (int at = size / 2 - 1; size == count && at >= 0; --at) {
          sift_down(kept, size, at, kept[at]);
        }
      } else if (item.value > kept[0].value) { // of equals, the first stays
        sift_down(kept, size, 0, item);
      }
    }
  }
  // Heap sort: the worst goes to the end
  for (int last = count - 1; last > 0; --last) {
    Candidate worst = kept[0];
    sift_down(kept, last, 0, kept[last]);
    kept[last] = worst;
  }
}

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
const SortKey* sort_all(const FilterLogitsArgs& args, Reader& reader) {
  constexpr int digit_bits = 11;
  constexpr int buckets = 1 << digit_bits;
  SortKey* from = args.scratch;
  SortKey* to = from + args.V;
  int starts[3][buckets] = {};
  float group[lanes];
  for (int id = 0; id < args.V; id += lanes) {
    store(group, reader.group(id));
    int width = args.V - id < lanes ? args.V - id : lanes;
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
    for (int i = 0; i < args.V; ++i) {
      uint32_t bucket = (from[i].key >> (digit * digit_bits)) & (buckets - 1);
      to[starts[digit][bucket]++] = from[i];
    }
    SortKey* sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

// weights[0, count) over their sum.
void normalise(float* weights, int count) {
  float total = 0;
  for (int i = 0; i < count; ++i) {
    total += weights[i];
  }
  for (int i = 0; i < count; ++i) {
    weights[i] /= total;
  }
}

} // namespace

void filter_logits_rows(
    const FilterLogitsArgs& args,
    int64_t begin,
    int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    int count = args.count;
    int32_t* ids = args.ids + row * count;
    float* weights = args.probs + row * count;
    Reader reader(args, row);
    if (count <= max_candidates) {
      Candidate kept[max_candidates];
      select(args, reader, kept);
      for (int i = 0; i < count; ++i) {
        ids[i] = kept[i].id;
        weights[i] = kept[i].value;
      }
    } else {
      const SortKey* sorted = sort_all(args, reader);
      for (int i = 0; i < count; ++i) {
        ids[i] = sorted[i].id;
        weights[i] = value_of(sorted[i].key);
      }
    }
    float best = weights[0];
    args.flags[row] = reader.flag(best);

    // Softmax
    F32x16 shift = broadcast(best);
    for (int i = 0; i < count; i += lanes) {
      int width = count - i < lanes ? count - i : lanes;
      store(weights + i, exp(load(weights + i, width) - shift), width);
    }
    normalise(weights, count);

    // The smallest prefix whose preceding mass is below top_p; then min_p
    float preceding = 0;
    float least = args.min_p * weights[0];
    for (int i = 0; i < count; ++i) {
      bool keep = args.top_p >= 1 || preceding < args.top_p;
      preceding += weights[i];
      weights[i] = keep && weights[i] >= least ? weights[i] : 0;
    }
    normalise(weights, count);
  }
}

} // namespace pyengine::PYENGINE_ISA
