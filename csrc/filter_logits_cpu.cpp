// filter_logits_cpu: one pass over a row's logits keeps the best candidates in
// a heap whose top is the worst of them; the rest is work on those alone.
//
// Sixteen logits are looked at together: past the first few hundred, nearly
// all groups hold nothing better than the worst candidate and are passed over.
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

// The best args.count of a row, best first.
void select(const FilterLogitsArgs& args, const float* row, Candidate* kept) {
  F32x16 temperature = broadcast(args.temperature);
  int count = args.count;
  int size = 0;
  float group[lanes];
  for (int id = 0; id < args.V; id += lanes) {
    int width = args.V - id < lanes ? args.V - id : lanes;
    if (width < lanes) {
      store(group, broadcast(-__builtin_inff()));
      memcpy(group, row + id, width * sizeof(float));
    }
    // -0 + 0 is 0: the two are the same logit
    F32x16 scaled =
        load(width < lanes ? group : row + id) / temperature + zero();
    if (size == count && !(max(scaled) > kept[0].value)) {
      continue;
    }
    store(group, scaled);
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
  Candidate kept[max_candidates];
  float weights[max_candidates + lanes] = {}; // whole lanes past the last
  for (int64_t row = begin; row < end; ++row) {
    int count = args.count;
    select(args, args.logits + row * args.V, kept);

    // Softmax
    for (int i = 0; i < count; ++i) {
      weights[i] = kept[i].value - kept[0].value;
    }
    for (int i = 0; i < count; i += lanes) {
      store(weights + i, exp(load(weights + i)));
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

    for (int i = 0; i < count; ++i) {
      args.ids[row * count + i] = kept[i].id;
      args.probs[row * count + i] = weights[i];
    }
  }
}

} // namespace pyengine::PYENGINE_ISA
