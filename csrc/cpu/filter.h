#pragma once
// filter.h: a row of logits to its candidates, for filter_logits and for
// quantized_filter_logits, whose logits come some columns at a time.
//
// One pass keeps the best candidates in a heap whose top is the worst of them.
// Sixteen logits are looked at together: past the first few hundred, nearly
// all groups hold nothing better than the worst candidate and are passed over.
// Edits are few and sorted, so the pass puts them in as it meets their ids.
// What a row keeps is a set chosen by a total order, so it does not matter in
// what pieces its logits came, nor how many heaps shared them.

#include <algorithm>

#include "cpu/mathfn.h"
#include "ops/filter_logits_cpu.h"

namespace pyengine::PYENGINE_ISA {

// Higher value first, then lower id.
PYENGINE_INLINE bool better(Candidate a, Candidate b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// Hands out logits [first, first + width) of a row in groups of sixteen, edited
// and divided by the temperature, -inf where the mask has no bit, and notes
// whether all as given were finite.
class Reader {
 public:
  Reader(
      const FilterArgs& args,
      int64_t row,
      const float* logits,
      int first,
      int width,
      int next_edit)
      : args_(args),
        logits_(logits),
        ids_(args.edit_ids + args.owner_of(row) * int64_t(args.edits)),
        order_(args.edit_order + args.owner_of(row) * int64_t(args.edits)),
        factors_(args.edit_factors + row * args.edits),
        deltas_(args.edit_deltas + row * args.edits),
        mask_(args.mask ? args.mask + row * args.words : nullptr),
        first_(first),
        width_(width),
        next_edit_(next_edit),
        temperature_(broadcast(args.temperature[args.owner_of(row)])),
        zeros_(zero()) {}

  // Logits at to at + 15; -inf past the end. Calls come in rising order.
  PYENGINE_INLINE F32x16 group(int at) {
    F32x16 nothing = broadcast(-__builtin_inff());
    float padded[lanes];
    const float* from = logits_ + at;
    bool edited = next_edit_ < args_.edits && edit_at() < at + lanes;
    if (width_ - at < lanes || edited) [[unlikely]] {
      int width = width_ - at < lanes ? width_ - at : lanes;
      zeros_ = zeros_ + load(from, width) * zero();
      store(padded, nothing);
      memcpy(padded, from, width * sizeof(float));
      int end = at + width;
      for (; next_edit_ < args_.edits && edit_at() < end; ++next_edit_) {
        int64_t lane = edit_at() - at;
        if (lane >= 0) {
          padded[lane] = edited_value(from[lane], order_[next_edit_]);
        }
      }
      from = padded;
    } else {
      zeros_ = zeros_ + load(from) * zero();
    }
    // -0 + 0 is 0: the two are the same logit. NaN would have no place.
    F32x16 scaled = load(from) / temperature_ + zero();
    scaled = select_less(nothing, scaled, scaled, nothing);
    uint32_t allowed = mask_ ? allowed_from(at) : all_lanes;
    if (allowed == all_lanes) {
      return scaled;
    }
    if (allowed == 0) {
      return nothing;
    }
    store(padded, scaled);
    for (int i = 0; i < lanes; ++i) {
      padded[i] = allowed >> i & 1 ? padded[i] : -__builtin_inff();
    }
    return load(padded);
  }

  // After all groups: 0: all finite; 1: some -inf; 2: NaN or +inf.
  int32_t flag() const {
    float sums[lanes];
    store(sums, zeros_);
    bool finite = true;
    for (float sum : sums) {
      finite &= sum == 0;
    }
    if (finite) {
      return 0;
    }
    for (int i = 0; i < width_; ++i) {
      if (!(logits_[i] < __builtin_inff())) {
        return 2;
      }
    }
    return 1;
  }

  int next_edit() const {
    return next_edit_;
  }

 private:
  static constexpr uint32_t all_lanes = (1u << lanes) - 1;

  // Bits of the mask for logits at to at + 15; those past its end are 0.
  PYENGINE_INLINE uint32_t allowed_from(int at) const {
    int id = first_ + at, word = id / 32;
    uint64_t bits = mask_[word];
    if (word + 1 < args_.words) {
      bits |= uint64_t(mask_[word + 1]) << 32;
    }
    return bits >> id % 32 & all_lanes;
  }

  // May be any number: ids outside of the row edit nothing.
  int64_t edit_at() const {
    return int64_t(ids_[order_[next_edit_]]) - first_;
  }

  float edited_value(float logit, int edit) const {
    float factor = factors_[edit];
    return (logit > 0 ? logit / factor : logit * factor) + deltas_[edit];
  }

  const FilterArgs& args_;
  const float* logits_;
  const int32_t* ids_;
  const int32_t* order_;
  const float* factors_;
  const float* deltas_;
  const uint32_t* mask_; // null: every token stays
  int first_;
  int width_;
  int next_edit_;
  F32x16 temperature_;
  F32x16 zeros_; // finite * 0 is 0, anything else NaN
};

// heap[0] is the worst; moves `item` down from `at`.
inline void sift_down(Candidate* heap, int size, int at, Candidate item) {
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

// Keeps one more candidate if it is among the `count` best.
PYENGINE_INLINE void offer(Kept& kept, int count, Candidate item) {
  if (kept.size < count) {
    kept.heap[kept.size++] = item;
    if (kept.size == count) {
      for (int at = count / 2 - 1; at >= 0; --at) {
        sift_down(kept.heap, count, at, kept.heap[at]);
      }
    }
  } else if (better(item, kept.heap[0])) {
    sift_down(kept.heap, count, 0, item);
  }
}

// Takes in logits [first, first + width) of a row. Ids rise from call to call.
inline void keep(
    const FilterArgs& args,
    int64_t row,
    const float* logits,
    int first,
    int width,
    Kept& kept) {
  Reader reader(args, row, logits, first, width, kept.next_edit);
  int count = args.count_of(row);
  float group[lanes];
  for (int at = 0; at < width; at += lanes) {
    F32x16 scaled = reader.group(at);
    if (kept.size == count && !(max(scaled) > kept.heap[0].value)) {
      continue;
    }
    store(group, scaled);
    int some = width - at < lanes ? width - at : lanes;
    for (int i = 0; i < some; ++i) {
      offer(kept, count, {group[i], first + at + i});
    }
  }
  kept.next_edit = reader.next_edit();
  int32_t flag = reader.flag();
  kept.flag = flag > kept.flag ? flag : kept.flag;
}

// What another heap kept of the same row.
inline void merge(int count, const Kept& other, Kept& kept) {
  for (int i = 0; i < other.size; ++i) {
    offer(kept, count, other.heap[i]);
  }
  kept.flag = other.flag > kept.flag ? other.flag : kept.flag;
}

// weights[0, count) over their sum.
inline void normalise(float* weights, int count) {
  float total = 0;
  for (int i = 0; i < count; ++i) {
    total += weights[i];
  }
  for (int i = 0; i < count; ++i) {
    weights[i] /= total;
  }
}

// From the row's logits, best first where its probabilities shall be, to these;
// `flag` is that of its logits. Sums run in the order of the candidates; past
// them stands what is no candidate.
inline void finish(const FilterArgs& args, int64_t row, int32_t flag) {
  int count = args.count_of(row);
  int owner = args.owner_of(row);
  float top_p = args.top_p[owner];
  float* weights = args.probs + row * args.n;
  std::fill(weights + count, weights + args.n, 0.0f);
  int32_t* ids = args.ids + row * args.n;
  std::fill(ids + count, ids + args.n, -1);
  float best = weights[0];
  args.flags[row] = best - best == 0 ? flag : 2; // 2: no candidate is left

  // Softmax
  F32x16 shift = broadcast(best);
  for (int i = 0; i < count; i += lanes) {
    int width = count - i < lanes ? count - i : lanes;
    store(weights + i, exp(load(weights + i, width) - shift), width);
  }
  normalise(weights, count);

  // The smallest prefix whose preceding mass is below top_p; then min_p
  float preceding = 0;
  float least = args.min_p[owner] * weights[0];
  for (int i = 0; i < count; ++i) {
    bool inside = top_p >= 1 || preceding < top_p;
    preceding += weights[i];
    weights[i] = inside && weights[i] >= least ? weights[i] : 0;
  }
  normalise(weights, count);
}

// The same from what the row kept, as many candidates as it has.
inline void finish(const FilterArgs& args, int64_t row, Kept& kept) {
  int count = args.count_of(row);
  // Heap sort: the worst goes to the end
  Candidate* heap = kept.heap;
  for (int last = count - 1; last > 0; --last) {
    Candidate worst = heap[0];
    sift_down(heap, last, 0, heap[last]);
    heap[last] = worst;
  }
  for (int i = 0; i < count; ++i) {
    args.ids[row * args.n + i] = heap[i].id;
    args.probs[row * args.n + i] = heap[i].value;
  }
  finish(args, row, kept.flag);
}

} // namespace pyengine::PYENGINE_ISA
