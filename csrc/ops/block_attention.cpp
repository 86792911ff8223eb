// block_attention: softmax(scale * q @ k.T + mask) @ v for the positions of one
// block against a linear or ring cache. Here are the sharing of work and the
// Metal launches; the arithmetic is in block_attention_cpu.cpp.

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "../metal/block_attention_params.h"
#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/integer.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/rows_cpu.h"
#include "cpu/storage.h"
#include "op.h"
#include "ops/block_attention_cpu.h"

namespace pyengine {

namespace {

// Multiply-adds from which sharing the spans of one head pays: each wave ends
// with a fold on one thread.
constexpr int64_t work_worth_waves = 1 << 22;

// Keys or values: rows of D must be whole, the rest may have any strides.
struct CacheView {
  explicit CacheView(const mx::array& a) : contiguous(a) {
    if (a.strides(3) == 1 || a.shape(3) == 1) {
      direct = a.data<char>();
      std::copy_n(a.strides().begin(), 3, strides);
    } else {
      strides[2] = a.shape(3);
      strides[1] = strides[2] * a.shape(2);
      strides[0] = strides[1] * a.shape(1);
    }
  }

  const void* get() const {
    return direct ? direct : contiguous.get();
  }

  Contiguous contiguous;
  const char* direct = nullptr;
  int64_t strides[3];
};

// Memory of the calling thread, kept for the next call.
float* scratch(size_t floats) {
  static thread_local std::vector<float> memory;
  if (memory.size() < floats) {
    memory.resize(floats);
  }
  return memory.data();
}

struct Spans {
  int64_t first;
  int64_t last;
};

Spans spans_of(const BlockAttentionArgs& args, const AttentionRows& rows) {
  int64_t first = int64_t(args.offset) + rows.first;
  int64_t newest = first + rows.positions - 1;
  int64_t oldest = std::max<int64_t>(0, first - args.window + 1);
  return {oldest / attention_span, newest / attention_span};
}

AttentionRows rows_of(const BlockAttentionArgs& args, int groups, int piece) {
  int slice = piece / groups;
  int group = piece % groups;
  int first = slice * max_rows;
  return {
      group / args.K,
      group % args.K,
      first,
      std::min(max_rows, args.T - first)};
}

// Floats for R rows of q and `states` softmax states.
size_t scratch_size(int64_t R, int64_t D, int64_t states) {
  return size_t(R * D + states * attention_state_size(R, D));
}

// One piece, a wave of its spans at a time, which share the threads: for few
// heads and a long cache. Spans are folded in their order, whatever the wave.
void attend(
    const BlockAttentionArgs& args,
    const AttentionRows& rows,
    int wave) {
  int R = rows.positions * (args.H / args.K);
  size_t state_size = attention_state_size(R, args.D);
  float* q32 = scratch(scratch_size(R, args.D, wave + 1));
  float* total = q32 + size_t(R) * args.D;
  float* states = total + state_size;

  PYENGINE_PICK_KERNEL(attention_load)(args, rows, q32);
  auto [oldest, newest] = spans_of(args, rows);
  auto state_of = [=, first = oldest](int64_t span) {
    return span == first ? total : states + span % wave * state_size;
  };
  for (int64_t span = oldest; span <= newest; span += wave) {
    int count = int(std::min<int64_t>(wave, newest - span + 1));
    Pool::shared().run(count, [&](int i) {
      PYENGINE_PICK_KERNEL(attention_over_span)
      (args, rows, q32, span + i, state_of(span + i));
    });
    for (int64_t next = std::max(span, oldest + 1); next < span + count;
         ++next) {
      PYENGINE_PICK_KERNEL(attention_fold)(R, args.D, total, state_of(next));
    }
  }
  PYENGINE_PICK_KERNEL(attention_finish)(args, rows, total);
}

constexpr int no_window = std::numeric_limits<int>::max();

void run(const BlockAttentionArgs& args, const Plan& plan, int B) {
  // No error: after some hundred tasks that throw one, MLX waits for ever
  if (!attends(args.offset, args.T, args.C, args.window)) {
    int64_t size = int64_t(B) * args.T * args.H * args.D;
    PYENGINE_PICK_KERNEL(store_nan)(args.out, args.storage, 0, size);
    return;
  }
  int64_t needed = std::min(args.offset, args.window - 1) + args.T;
  int pieces = plan.slices * plan.groups;
  auto piece = [&](int i) { attend(args, rows_of(args, plan.groups, i), 1); };
  // The plan counts the whole capacity, of which little may be in use.
  int64_t work = plan.work / args.C * needed * plan.slices;
  int threads = Pool::shared().threads();
  if (threads > 1 && pieces >= threads && work >= work_worth_sharing) {
    Pool::shared().run(pieces, piece);
  } else if (threads > 1 && pieces < threads && work >= work_worth_waves) {
    for (int i = 0; i < pieces; ++i) {
      attend(args, rows_of(args, plan.groups, i), 2 * threads);
    }
  } else {
    for (int i = 0; i < pieces; ++i) {
      piece(i);
    }
  }
}

// The tiles of metal/block_attention.metal.
constexpr int simd_keys = 32;
constexpr int score_rows = 4; // of a simdgroup
constexpr int value_rows = 8;
constexpr int tile_rows = 64; // of a threadgroup
constexpr int tile_bytes = 128; // of a row, staged together
constexpr int slice_columns = 128;
constexpr int value_bytes = 4096; // of v, staged together
constexpr int ahead = 2; // loads of a tile of scores for each thread, at most
constexpr int loading_simds = 4; // at least, so that few rows load as fast

int pieces(int n, int size) {
  return (n + size - 1) / size;
}

int round_up(int n, int step) {
  return pieces(n, step) * step;
}

// The spans that the visible positions of a slice may touch.
int spans_needed(int C, int positions, std::optional<int> window) {
  if (!window) {
    return pieces(C, attention_span);
  }
  int64_t visible = std::min<int64_t>(C, int64_t(*window) - 1 + positions);
  return int((visible + attention_span - 2) / attention_span + 1);
}

// One slice of max_rows positions: its scores, what their spans make of the
// values, and the fold of these. Grids follow from shapes alone: where a block
// stands is read on the device.
class SliceLaunches {
 public:
  SliceLaunches(
      const mx::array& q,
      const mx::array& k,
      int first,
      float scale,
      std::optional<int> window,
      bool has_start)
      : dtype_(q.dtype()),
        B_(q.shape(0)),
        has_start_(has_start) {
    int T = q.shape(1), H = q.shape(2), D = q.shape(3);
    int K = k.shape(1), C = k.shape(2);
    int positions = std::min(T - first, max_rows);
    R_ = positions * (H / K);
    int tiles = pieces(R_, tile_rows);
    params_ = {
        .T = T,
        .H = H,
        .K = K,
        .C = C,
        .D = D,
        .first = first,
        .positions = positions,
        .rows = tiles == 1 ? R_ : round_up(pieces(R_, tiles), value_rows),
        .keys = 0,
        .spans = spans_needed(C, positions, window),
        .window = window.value_or(no_window),
        .scale = scale,
        .minus_zero = -0.0f};
    params_.keys = row_simds() <= 4 ? 64 : 32;
  }

  Launch scores() const {
    int staged = row_simds() * score_rows + params_.keys;
    int loads = staged * tile_bytes / 16;
    auto launch = stage(
        "scores",
        params_.spans * attention_span / params_.keys,
        std::max(
            row_simds() * params_.keys / simd_keys, pieces(loads, 32 * ahead)));
    launch.buffers = {
        input("q", {B_, params_.T, params_.H, params_.D}),
        state("k"),
        offset(),
        score_list(Role::out),
        params_buffer()};
    add_start(launch);
    launch.threadgroup_memory = {{0, staged * tile_bytes / itemsize() * 4}};
    return launch;
  }

  Launch values() const {
    int simds = pieces(params_.rows, value_rows);
    auto launch = stage(
        "values", params_.spans * pieces(params_.D, slice_columns), simds);
    launch.buffers = {
        state("v"),
        offset(),
        score_list(Role::in),
        value_list(Role::out),
        state_list(Role::out),
        params_buffer()};
    add_start(launch);
    launch.threadgroup_memory = {
        {0, simds * attention_chunk * value_rows * 4},
        {1, value_bytes / itemsize() * 4}};
    return launch;
  }

  Launch fold() const {
    auto launch =
        kernel("fold", {R_, B_ * params_.K, 1}, round_up(params_.D / 4, 32));
    launch.buffers = {
        offset(),
        value_list(Role::in),
        state_list(Role::in),
        // Each slice writes rows of its own
        Buffer::array(
            params_.first == 0 ? Role::out : Role::inout,
            "out",
            {B_, params_.T, params_.H, params_.D},
            dtype_),
        params_buffer()};
    return launch;
  }

 private:
  int itemsize() const {
    return int(mx::size_of(dtype_));
  }

  int row_simds() const {
    return pieces(params_.rows, score_rows);
  }

  // Without buffers.
  Launch kernel(const char* name, std::array<int, 3> grid, int threads) const {
    std::string library = "block_attention";
    auto host_name = library + "_" + name + "_" + dtype_name(dtype_);
    return {library, host_name, grid, {threads, 1, 1}};
  }

  // Scores or values: so many threadgroups per tile of rows.
  Launch stage(const char* name, int groups, int simds) const {
    auto launch = kernel(
        name,
        {groups, B_ * params_.K, pieces(R_, tile_rows)},
        32 * std::max(simds, loading_simds));
    launch.constants = {{0, has_start_}};
    return launch;
  }

  mx::Shape cache() const {
    return {B_, params_.K, params_.C, params_.D};
  }

  Buffer input(const char* name, mx::Shape shape) const {
    return Buffer::array(Role::in, name, std::move(shape), dtype_, 16);
  }

  Buffer state(const char* name) const {
    auto buffer = input(name, cache());
    buffer.state = true;
    return buffer;
  }

  Buffer offset() const {
    return Buffer::array(Role::in, "offset", {}, mx::int32);
  }

  void add_start(Launch& launch) const {
    if (has_start_) {
      launch.buffers.push_back(Buffer::array(Role::in, "start", {}, mx::int32));
    }
  }

  // What one launch leaves for the next.
  Buffer score_list(Role role) const {
    mx::Shape shape = {B_ * params_.K, R_, params_.spans * attention_span};
    return Buffer::array(role, "scores", std::move(shape), mx::float32, 16);
  }

  Buffer value_list(Role role) const {
    mx::Shape shape = {B_ * params_.K, params_.spans, R_, params_.D};
    return Buffer::array(role, "values", std::move(shape), mx::float32, 16);
  }

  Buffer state_list(Role role) const {
    mx::Shape shape = {B_ * params_.K, params_.spans, R_, 2};
    return Buffer::array(role, "states", std::move(shape), mx::float32);
  }

  Buffer params_buffer() const {
    std::string data(reinterpret_cast<const char*>(&params_), sizeof(params_));
    return {"params", Role::bytes, {}, mx::uint32, 4, std::move(data)};
  }

  mx::Dtype dtype_;
  int B_;
  bool has_start_;
  BlockAttentionParams params_;
  int R_; // rows of a key head
};

// One group per batch and key head, slices of max_rows positions.
Plan block_attention_plan(int B, int T, int H, int K, int C, int D) {
  int positions = std::min(T, max_rows);
  Plan plan;
  plan.slices = pieces(T, max_rows);
  plan.groups = B * K;
  plan.columns = H / K * D;
  plan.group_scratch = scratch_size(positions * (H / K), D, 2);
  plan.work = 2 * int64_t(B) * positions * H * C * D;
  return plan;
}

// Inputs: q, k, offset, start where given, v.
struct BlockAttention {
  static constexpr const char* op = "block_attention";
  float scale;
  std::optional<int> window;
  bool operator==(const BlockAttention&) const = default;

  // Three per slice. Longer blocks are prefill, and MLX's.
  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int T = in[0].shape(1);
    if (T > max_launch_rows) {
      return {};
    }
    bool has_start = in.size() == 5;
    std::vector<Launch> launches;
    for (int first = 0; first < T; first += max_rows) {
      SliceLaunches slice(in[0], in[1], first, scale, window, has_start);
      launches.insert(
          launches.end(), {slice.scores(), slice.values(), slice.fold()});
    }
    return launches;
  }

  auto task(const Arrays& in, Arrays& out) const {
    const auto &q = in[0], &k = in[1];
    BlockAttentionArgs args = {};
    args.out = out[0].data<void>();
    args.storage = storage_of(q.dtype());
    args.T = q.shape(1);
    args.H = q.shape(2);
    args.K = k.shape(1);
    args.C = k.shape(2);
    args.D = q.shape(3);
    args.window = window.value_or(no_window);
    args.scale = scale;
    int B = q.shape(0);
    auto plan = block_attention_plan(B, args.T, args.H, args.K, args.C, args.D);
    return [q = Contiguous(q),
            k = CacheView(k),
            v = CacheView(in.back()),
            offset = in[2].data<int32_t>(),
            start = in.size() == 5 ? in[3].data<int32_t>() : nullptr,
            plan,
            B,
            args]() mutable {
      args.q = q.get();
      args.k = k.get();
      args.v = v.get();
      std::copy_n(k.strides, 3, args.k_strides);
      std::copy_n(v.strides, 3, args.v_strides);
      args.offset = *offset;
      args.start = start ? *start : 0;
      run(args, plan, B);
    };
  }
};

mx::array block_attention(
    const mx::array& q, // [B, T, H, D]
    const mx::array& k, // [B, K, C, D]
    const mx::array& v,
    const mx::array& offset, // int32 []
    float scale,
    std::optional<Integer> window,
    const std::optional<mx::array>& start) { // int32 []
  constexpr auto op = BlockAttention::op;
  check_storage_dtype(op, "q", q);
  check(q.ndim() == 4, op, "q", "have shape [B, T, H, D]", q.shape());
  check(k.ndim() == 4, op, "k", "have shape [B, K, C, D]", k.shape());
  int T = q.shape(1);
  int H = q.shape(2);
  int D = q.shape(3);
  int K = k.shape(1);
  int C = k.shape(2);
  check(
      D >= 16 && D % 16 == 0 && D <= attention_max_width,
      op,
      "D",
      "be a multiple of 16 and at most 512",
      D);
  check_shape(op, "k", k, {q.shape(0), K, C, D});
  check_shape(op, "v", v, k.shape());
  check_dtype(op, "k", k, q.dtype(), "have the dtype of q");
  check_dtype(op, "v", v, q.dtype(), "have the dtype of q");
  if (K == 0 || H % K != 0) {
    fail(op, "H", "be a multiple of K " + std::to_string(K), H);
  }
  check_block(op, offset, T, C);
  if (window) {
    check(
        window->wide() >= 1 && window->wide() <= INT32_MAX,
        op,
        "window",
        "be at least 1 and below 2**31",
        *window);
  }
  if (offset.is_available() && q.size() > 0) {
    int known = *offset.data<int32_t>();
    int seen = window ? int(*window) : no_window;
    if (!attends(known, T, C, seen)) {
      std::string rule = "be at least " +
          std::to_string(std::min(known, seen - 1) + T) +
          " to hold every visible position";
      fail(op, "C", rule, C);
    }
  }
  Arrays inputs = {q, k, offset};
  if (start) {
    check_shape(op, "start", *start, {});
    check_dtype(op, "start", *start, mx::int32, "be int32");
    inputs.push_back(*start);
  }
  inputs.push_back(v);
  return lazy_result(
      BlockAttention{scale, window}, q.shape(), q.dtype(), std::move(inputs));
}

} // namespace

void bind_block_attention(nb::module_& m) {
  m.def(
      "block_attention",
      &block_attention,
      "q"_a,
      "k"_a,
      "v"_a,
      "offset"_a,
      "scale"_a,
      "window"_a.none(),
      "start"_a.none());
  m.def(
      "block_attention_plan",
      &block_attention_plan,
      "B"_a,
      "T"_a,
      "H"_a,
      "K"_a,
      "C"_a,
      "D"_a);
}

} // namespace pyengine
