// accept_block: how many drafts of each of several blocks are kept, and what
// follows them. The rules are in accept_block_cpu.cpp.

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "op.h"
#include "ops/accept_block_cpu.h"

namespace pyengine {

namespace {

// A simdgroup takes every 16th row: more threads would leave each fewer
// registers than it needs.
constexpr int max_simds = 16;

// What a GPU is told of `starts` goes with the launch: 4 KiB at most.
constexpr int max_blocks = 1000;

// Inputs: p_ids, p_probs, q_ids, q_probs, drafts, position, seed, rule.
struct AcceptBlock {
  static constexpr const char* op = "accept_block";
  std::vector<int> counts; // rows of p of each block, k + 1
  int vocab;
  bool operator==(const AcceptBlock&) const = default;

  // A threadgroup per block. None for blocks that its memory does not hold, and
  // where no block has a draft: a GPU binds no empty arrays.
  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int R = in[0].shape(0), n = in[0].shape(1), m = in[2].shape(1);
    int Q = int(counts.size()), k = most_drafts();
    if (k == 0 || k > max_launch_rows || std::max(n, m) > max_scanned ||
        Q > max_blocks) {
      return {};
    }
    std::vector<uint32_t> starts = {0}; // of each block's rows of p
    for (int count : counts) {
      starts.push_back(starts.back() + count);
    }
    Launch launch(op, op, {Q, 1, 1}, {32 * std::min(k + 1, max_simds), 1, 1});
    launch.buffers = {
        Buffer::array(Role::in, "p_ids", {R, n}, mx::int32),
        Buffer::array(Role::in, "p_probs", {R, n}, mx::float32),
        Buffer::array(Role::in, "q_ids", {R - Q, m}, mx::int32),
        Buffer::array(Role::in, "q_probs", {R - Q, m}, mx::float32),
        Buffer::array(Role::in, "drafts", {R - Q}, mx::int32),
        Buffer::array(Role::in, "position", {Q}, mx::int32),
        Buffer::array(Role::in, "seed", {Q}, mx::uint32),
        Buffer::array(Role::in, "rule", {Q}, mx::int32),
        Buffer::array(Role::out, "accepted", {Q}, mx::int32),
        Buffer::array(Role::out, "next", {Q}, mx::int32),
        Buffer::words("starts", starts),
        Buffer::scalar("n", uint32_t(n)),
        Buffer::scalar("m", uint32_t(m)),
        Buffer::scalar("vocab", uint32_t(vocab)),
        Buffer::scalar("minus_zero", -0.0f)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    std::vector<Contiguous> arrays(in.begin(), in.end());
    return [arrays = std::move(arrays),
            op = *this,
            accepted = out[0].data<int32_t>(),
            next = out[1].data<int32_t>(),
            n = in[0].shape(1),
            m = in[2].shape(1)] {
      AcceptBlockArgs first = {};
      first.p_ids = arrays[0].get<int32_t>();
      first.p_probs = arrays[1].get<float>();
      first.q_ids = arrays[2].get<int32_t>();
      first.q_probs = arrays[3].get<float>();
      first.drafts = arrays[4].get<int32_t>();
      auto* position = arrays[5].get<int32_t>();
      auto* seed = arrays[6].get<uint32_t>();
      auto* rule = arrays[7].get<int32_t>();
      first.n = n;
      first.m = m;
      first.vocab = op.vocab;
      std::vector<int> starts = {0};
      for (int count : op.counts) {
        starts.push_back(starts.back() + count);
      }
      auto accept = [&](int64_t begin, int64_t end) {
        std::vector<float> weights(n);
        // Long rows find their partners through a table, short ones by looking
        std::vector<float> by_id(m > max_scanned ? op.vocab : 0);
        for (int64_t s = begin; s < end; ++s) {
          auto args = first;
          int64_t p_row = starts[s], q_row = p_row - s;
          args.p_ids += p_row * n;
          args.p_probs += p_row * n;
          args.q_ids += q_row * m;
          args.q_probs += q_row * m;
          args.drafts += q_row;
          args.accepted = accepted + s;
          args.next = next + s;
          args.weights = weights.data();
          args.by_id = by_id.empty() ? nullptr : by_id.data();
          args.k = op.counts[s] - 1;
          args.rule = Rule(rule[s]);
          args.position = uint32_t(position[s]);
          args.seed = seed[s];
          PYENGINE_PICK_KERNEL(accept_one_block)(args);
        }
      };
      int64_t looks = int64_t(op.most_drafts()) * n * std::min(m, max_scanned);
      split_rows(int64_t(op.counts.size()), looks, accept);
    };
  }

  int most_drafts() const {
    return *std::max_element(counts.begin(), counts.end()) - 1;
  }
};

constexpr auto op = AcceptBlock::op;

void check_rows(
    const char* ids_name,
    const mx::array& ids,
    const char* probs_name,
    const mx::array& probs,
    int64_t rows,
    const char* shape) {
  check_dtype(op, ids_name, ids, mx::int32, "be int32");
  check(ids.ndim() == 2 && ids.shape(1) > 0, op, ids_name, shape, ids.shape());
  check(
      ids.shape(0) == rows,
      op,
      ids_name,
      "have the rows that counts name",
      ids.shape());
  check_array(op, probs_name, probs, mx::float32, ids.shape());
}

// The rows of all blocks.
int64_t check_counts(const std::vector<Integer>& counts) {
  check(!counts.empty(), op, "counts", "name at least 1 block", "none");
  int64_t rows = 0;
  for (auto count : counts) {
    check(
        count.wide() >= 1 && count.wide() < max_positions,
        op,
        "counts",
        "be 1 or more and below 2**30",
        count);
    rows += count.wide();
  }
  check(rows <= INT32_MAX, op, "counts", "add up to less than 2**31", rows);
  return rows;
}

void check_rule(const mx::array& rule, int Q) {
  check_array(op, "rule", rule, mx::int32, {Q});
  if (!rule.is_available() || !rule.flags().row_contiguous) {
    return;
  }
  for (auto* r = rule.data<int32_t>(); r < rule.data<int32_t>() + Q; ++r) {
    check(*r >= 0 && *r <= 2, op, "rule", "be 0, 1 or 2", *r);
  }
}

// Drafts kept and the next token of each block, int32 [Q].
Arrays accept_block(
    const mx::array& p_ids, // [R, n]
    const mx::array& p_probs, // [R, n]
    const mx::array& q_ids, // [R - Q, m]
    const mx::array& q_probs, // [R - Q, m]
    const mx::array& drafts, // [R - Q]
    const mx::array& position, // [Q]
    const mx::array& seed, // [Q]
    const mx::array& rule, // [Q]
    const std::vector<Integer>& counts,
    Integer vocab) {
  int64_t rows = check_counts(counts);
  int Q = int(counts.size()), k = int(rows - Q);
  check_rows("q_ids", q_ids, "q_probs", q_probs, k, "have shape [R - Q, m]");
  check_rows("p_ids", p_ids, "p_probs", p_probs, rows, "have shape [R, n]");
  check_array(op, "drafts", drafts, mx::int32, {k});
  check_array(op, "position", position, mx::int32, {Q});
  check_array(op, "seed", seed, mx::uint32, {Q});
  check_rule(rule, Q);
  check(
      vocab > 0 && vocab <= max_vocab,
      op,
      "vocab",
      "be positive and at most 2097152",
      vocab);
  auto inputs = Arrays{p_ids, p_probs, q_ids, q_probs, drafts};
  inputs.insert(inputs.end(), {position, seed, rule});
  return lazy_results(
      AcceptBlock{{counts.begin(), counts.end()}, vocab},
      {{Q}, {Q}},
      {mx::int32, mx::int32},
      inputs);
}

} // namespace

void bind_accept_block(nb::module_& m) {
  m.def(
      "accept_block",
      &accept_block,
      "p_ids"_a,
      "p_probs"_a,
      "q_ids"_a,
      "q_probs"_a,
      "drafts"_a,
      "position"_a,
      "seed"_a,
      "rule"_a,
      "counts"_a,
      "vocab"_a);
}

} // namespace pyengine
