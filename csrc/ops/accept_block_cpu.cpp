// accept_block_cpu: the rules, one block at a time. Sums run in the order of
// p's candidates, as in the reference, so every decision is the same.

#include "ops/accept_block_cpu.h"

#include "cpu/rng.h"

namespace pyengine::PYENGINE_ISA {

namespace {

float probability_of(
    const int32_t* ids,
    const float* probs,
    int count,
    int32_t token) {
  for (int i = 0; i < count; ++i) {
    if (ids[i] == token) {
      return probs[i];
    }
  }
  return 0;
}

// min(1, p / q); 0 where p is.
float ratio(float p, float q) {
  if (!(p > 0)) {
    return 0;
  }
  float r = p / q;
  return r < 1 ? r : 1;
}

float p_of(const AcceptBlockArgs& args, int row, int32_t token) {
  int64_t at = int64_t(row) * args.n;
  return probability_of(args.p_ids + at, args.p_probs + at, args.n, token);
}

float q_of(const AcceptBlockArgs& args, int row, int32_t token) {
  int64_t at = int64_t(row) * args.m;
  return probability_of(args.q_ids + at, args.q_probs + at, args.m, token);
}

// args.weights = (scale * p - q)+ of a row; returns its mass. An id outside of
// the vocabulary has no q.
float fill_excess(const AcceptBlockArgs& args, int row, float scale) {
  const int32_t* p_ids = args.p_ids + int64_t(row) * args.n;
  const float* p = args.p_probs + int64_t(row) * args.n;
  const int32_t* q_ids = args.q_ids + int64_t(row) * args.m;
  const float* q = args.q_probs + int64_t(row) * args.m;
  auto known = [&](int32_t id) { return id >= 0 && id < args.vocab; };
  auto fill_table = [&](bool clear) {
    for (int j = 0; args.by_id && j < args.m; ++j) {
      if (known(q_ids[j])) {
        args.by_id[q_ids[j]] = clear ? 0 : q[j];
      }
    }
  };
  fill_table(false);
  float mass = 0;
  for (int i = 0; i < args.n; ++i) {
    float other = !known(p_ids[i]) ? 0
        : args.by_id               ? args.by_id[p_ids[i]]
                                   : q_of(args, row, p_ids[i]);
    float excess = scale * p[i] - other;
    args.weights[i] = excess > 0 ? excess : 0;
    mass += args.weights[i];
  }
  fill_table(true);
  return mass;
}

// Keeps `accepted` drafts and draws what follows them.
void finish(const AcceptBlockArgs& args, int accepted, float scale) {
  int64_t at = int64_t(accepted) * args.n;
  const float* weights = args.p_probs + at;
  if (accepted < args.k && fill_excess(args, accepted, scale) > 0) {
    weights = args.weights;
  }
  float u =
      uniform(args.position, uint32_t(accepted), args.seed, Purpose::correct);
  *args.accepted = accepted;
  *args.next = invert(args.p_ids + at, weights, args.n, u);
}

void accept_by_residual(const AcceptBlockArgs& args) {
  int i = 0;
  for (; i < args.k; ++i) {
    int32_t d = args.drafts[i];
    float h = ratio(p_of(args, i, d), q_of(args, i, d));
    float u = uniform(args.position, uint32_t(i), args.seed, Purpose::accept);
    if (!(u < h)) {
      break;
    }
  }
  finish(args, i, 1);
}

void accept_by_block(const AcceptBlockArgs& args) {
  int accepted = 0;
  float scale = 1; // of the row that follows `accepted` drafts
  float a = 1;
  for (int i = 1; i <= args.k; ++i) {
    int32_t d = args.drafts[i - 1];
    a = ratio(a * p_of(args, i - 1, d), q_of(args, i - 1, d));
    float h = a;
    if (i < args.k) {
      float mass = fill_excess(args, i, a);
      float whole = mass + (1 - a);
      h = whole > 0 ? mass / whole : 1;
    }
    float u =
        uniform(args.position, uint32_t(i - 1), args.seed, Purpose::accept);
    if (u < h) { // the last success counts, not the first failure
      accepted = i;
      scale = a;
    }
  }
  finish(args, accepted, scale);
}

void accept_by_coupled(const AcceptBlockArgs& args) {
  int32_t token = 0;
  int i = 0;
  for (;; ++i) {
    int64_t at = int64_t(i) * args.n;
    uint32_t position = args.position + 1 + uint32_t(i);
    token =
        race(args.p_ids + at, args.p_probs + at, args.n, position, args.seed);
    if (i == args.k || token != args.drafts[i]) {
      break;
    }
  }
  *args.accepted = i;
  *args.next = token;
}

} // namespace

void accept_one_block(const AcceptBlockArgs& args) {
  if (args.k > 0 && args.rule == Rule::residual) {
    accept_by_residual(args);
  } else if (args.k > 0 && args.rule == Rule::block) {
    accept_by_block(args);
  } else {
    accept_by_coupled(args);
  }
}

} // namespace pyengine::PYENGINE_ISA
