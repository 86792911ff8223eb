// block_attention: checks, primitive, the sharing of work and the Metal
// launches; the arithmetic is in block_attention_cpu.cpp.

#include "ops/block_attention.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "../metal/block_attention_params.h"
#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/rows_cpu.h"
#include "cpu/storage.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/block_attention_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "block_attention";

// Multiply-adds from which sharing the spans of one head pays: each wave ends
// with a fold on one thread.
constexpr int64_t work_worth_waves = 1 << 22;

// Keys or values: rows of D must be whole, the rest may have any strides.
struct CacheView {
  explicit CacheView(const mx::array& a) : packed(a) {
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
    return direct ? direct : packed.get();
  }

  Packed packed;
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

// One piece, its spans one after the other.
void attend(const BlockAttentionArgs& args, const AttentionRows& rows) {
  int R = rows.positions * (args.H / args.K);
  float* q32 = scratch(scratch_size(R, args.D, 2));
  float* total = q32 + size_t(R) * args.D;
  float* next = total + attention_state_size(R, args.D);

  PYENGINE_PICK_KERNEL(attention_load)(args, rows, q32);
  auto [first, last] = spans_of(args, rows);
  auto over_span = PYENGINE_PICK_KERNEL(attention_over_span);
  over_span(args, rows, q32, first, total);
  for (int64_t span = first + 1; span <= last; ++span) {
    over_span(args, rows, q32, span, next);
    PYENGINE_PICK_KERNEL(attention_fold)(R, args.D, total, next);
  }
  PYENGINE_PICK_KERNEL(attention_finish)(args, rows, total);
}

// One piece, a wave of its spans at a time: for few heads and a long cache.
// Spans are folded in the order of `attend`, so the bits are the same.
void attend_in_waves(
    const BlockAttentionArgs& args,
    const AttentionRows& rows) {
  int R = rows.positions * (args.H / args.K);
  size_t state_size = attention_state_size(R, args.D);
  int wave = 2 * Pool::shared().threads();
  float* q32 = scratch(scratch_size(R, args.D, wave + 1));
  float* total = q32 + size_t(R) * args.D;
  float* states = total + state_size;

  PYENGINE_PICK_KERNEL(attention_load)(args, rows, q32);
  auto [first, last] = spans_of(args, rows);
  for (int64_t span = first; span <= last; span += wave) {
    int count = int(std::min<int64_t>(wave, last - span + 1));
    Pool::shared().run(count, [&](int i) {
      PYENGINE_PICK_KERNEL(attention_over_span)
      (args, rows, q32, span + i, states + i * state_size);
    });
    for (int i = 0; i < count; ++i) {
      float* next = states + i * state_size;
      if (span == first && i == 0) {
        std::copy_n(next, state_size, total);
      } else {
        PYENGINE_PICK_KERNEL(attention_fold)(R, args.D, total, next);
      }
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
  auto piece = [&](int i) { attend(args, rows_of(args, plan.groups, i)); };
  // The plan counts the whole capacity, of which little may be in use.
  int64_t work = plan.work / args.C * needed * plan.slices;
  int threads = Pool::shared().threads();
  if (threads > 1 && pieces >= threads && work >= work_worth_sharing) {
    Pool::shared().run(pieces, piece);
  } else if (threads > 1 && pieces < threads && work >= work_worth_waves) {
    for (int i = 0; i < pieces; ++i) {
      attend_in_waves(args, rows_of(args, plan.groups, i));
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
constexpr int loading_simds = 4; // at least, so that few rows load as fast
// More positions than any block has.
constexpr int max_launched = 128;

int round_up(int n, int step) {
  return (n + step - 1) / step * step;
}

// The spans that the visible positions of a slice may touch.
int spans_needed(int C, int positions, std::optional<int> window) {
  if (!window) {
    return round_up(C, attention_span) / attention_span;
  }
  int64_t visible = std::min<int64_t>(C, int64_t(*window) - 1 + positions);
  return int((visible + attention_span - 2) / attention_span + 1);
}

Buffer params_buffer(const BlockAttentionParams& params) {
  std::string data(reinterpret_cast<const char*>(&params), sizeof(params));
  return {"params", Buffer::Role::bytes, {}, mx::uint32, 4, std::move(data)};
}

} // namespace

bool block_attention_has_launch(int T) {
  return T <= max_launched;
}

std::vector<Launch> block_attention_launches(
    int B,
    int T,
    int H,
    int K,
    int C,
    int D,
    mx::Dtype dtype,
    float scale,
    std::optional<int> window,
    bool has_start) {
  using Role = Buffer::Role;
  auto name = dtype_name(dtype);
  int itemsize = int(mx::size_of(dtype));
  Buffer q = Buffer::array(Role::in, "q", {B, T, H, D}, dtype, 16);
  Buffer k = Buffer::array(Role::in, "k", {B, K, C, D}, dtype, 16);
  Buffer v = Buffer::array(Role::in, "v", {B, K, C, D}, dtype, 16);
  Buffer offset = Buffer::array(Role::in, "offset", {}, mx::int32);
  Buffer start = Buffer::array(Role::in, "start", {}, mx::int32);
  std::vector<Launch> launches;
  for (int first = 0; first < T; first += max_rows) {
    int positions = std::min(T - first, max_rows);
    int R = positions * (H / K);
    int tiles = (R + tile_rows - 1) / tile_rows;
    int rows = tiles == 1 ? R : round_up((R + tiles - 1) / tiles, value_rows);
    int spans = spans_needed(C, positions, window);
    int row_simds = (rows + score_rows - 1) / score_rows;
    int keys = row_simds <= 4 ? 64 : 32;
    Buffer params = params_buffer(
        {T,
         H,
         K,
         C,
         D,
         first,
         positions,
         rows,
         keys,
         spans,
         window.value_or(no_window),
         scale,
         -0.0f});

    Launch scores;
    scores.library = op;
    scores.kernel = std::string(op) + "_scores_" + name;
    scores.constants = {{0, has_start}};
    scores.grid = {spans * attention_span / keys, B * K, tiles};
    scores.threadgroup = {
        32 * std::max(row_simds * keys / simd_keys, loading_simds), 1, 1};
    scores.buffers = {
        q,
        k,
        offset,
        Buffer::array(
            Role::out,
            "scores",
            {B * K, R, spans * attention_span},
            mx::float32,
            16),
        params};
    int staged = row_simds * score_rows + keys;
    scores.threadgroup_memory = {{0, staged * tile_bytes / itemsize * 4}};

    Launch values;
    int slices = (D + slice_columns - 1) / slice_columns;
    int simds = (rows + value_rows - 1) / value_rows;
    values.library = op;
    values.kernel = std::string(op) + "_values_" + name;
    values.constants = scores.constants;
    values.grid = {spans * slices, B * K, tiles};
    values.threadgroup = {32 * std::max(simds, loading_simds), 1, 1};
    values.buffers = {
        v,
        offset,
        scores.buffers[3],
        Buffer::array(
            Role::out, "values", {B * K, spans, R, D}, mx::float32, 16),
        Buffer::array(Role::out, "states", {B * K, spans, R, 2}, mx::float32),
        params};
    values.buffers[2].role = Role::in;
    values.threadgroup_memory = {
        {0, simds * attention_chunk * value_rows * 4},
        {1, value_bytes / itemsize * 4}};

    Launch fold;
    fold.library = op;
    fold.kernel = std::string(op) + "_fold_" + name;
    fold.constants = {};
    fold.grid = {R, B * K, 1};
    fold.threadgroup = {round_up(D / 4, 32), 1, 1};
    fold.buffers = {
        offset,
        values.buffers[3],
        values.buffers[4],
        // Each slice writes rows of its own
        Buffer::array(
            first == 0 ? Role::out : Role::inout, "out", {B, T, H, D}, dtype),
        params};
    fold.buffers[1].role = fold.buffers[2].role = Role::in;

    if (has_start) {
      scores.buffers.push_back(start);
      values.buffers.push_back(start);
    }
    launches.insert(launches.end(), {scores, values, fold});
  }
  return launches;
}

Plan block_attention_plan(int B, int T, int H, int K, int C, int D) {
  int positions = std::min(T, max_rows);
  Plan plan;
  plan.slices = (T + max_rows - 1) / max_rows;
  plan.groups = B * K;
  plan.columns = H / K * D;
  plan.group_scratch = scratch_size(positions * (H / K), D, 2);
  plan.work = 2 * int64_t(B) * positions * H * C * D;
  return plan;
}

mx::array block_attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& offset,
    float scale,
    std::optional<Integer> window,
    const std::optional<mx::array>& start) {
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
  if (T > C) {
    fail(op, "T", "be at most the capacity " + std::to_string(C), T);
  }
  check_offset(op, offset, T);
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
  auto stream = mx::to_stream({});
  std::vector<mx::array> inputs = {packed_on_gpu(q, stream), k, v, offset};
  if (start) {
    check_shape(op, "start", *start, {});
    check_dtype(op, "start", *start, mx::int32, "be int32");
    inputs.push_back(*start);
  }
  return mx::array(
      q.shape(),
      q.dtype(),
      std::make_shared<BlockAttention>(stream, scale, window),
      std::move(inputs));
}

void BlockAttention::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& q = inputs[0];
  const auto& k = inputs[1];
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }

  BlockAttentionArgs args;
  args.out = out.data<void>();
  args.storage = storage_of(q.dtype());
  args.T = q.shape(1);
  args.H = q.shape(2);
  args.K = k.shape(1);
  args.C = k.shape(2);
  args.D = q.shape(3);
  args.window = window_.value_or(no_window);
  args.scale = scale_;

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  encoder.dispatch(
      [q = Packed(q),
       k = CacheView(k),
       v = CacheView(inputs[2]),
       offset = inputs[3].data<int32_t>(),
       start = inputs.size() == 5 ? inputs[4].data<int32_t>() : nullptr,
       plan = block_attention_plan(
           q.shape(0), args.T, args.H, args.K, args.C, args.D),
       B = q.shape(0),
       args]() mutable {
        args.q = q.get();
        args.k = k.get();
        args.v = v.get();
        std::copy_n(k.strides, 3, args.k_strides);
        std::copy_n(v.strides, 3, args.v_strides);
        args.offset = *offset;
        args.start = start ? *start : 0;
        run(args, plan, B);
      });
}

void BlockAttention::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& q = inputs[0];
  const auto& k = inputs[1];
  auto& out = outputs[0];
  if (!block_attention_has_launch(q.shape(1))) {
    throw std::runtime_error(
        "[block_attention] has no Metal kernel for more than 128 positions; "
        "pyengine.ops.block_attention runs plain MLX there.");
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  // A copy of a whole cache for every block would go unnoticed
  for (int i : {1, 2}) {
    if (!inputs[i].flags().row_contiguous) {
      throw std::runtime_error(
          "[block_attention] k and v must be contiguous on a GPU but got a "
          "strided view; pass mx.contiguous of it.");
    }
  }
  auto launches = block_attention_launches(
      q.shape(0),
      q.shape(1),
      q.shape(2),
      k.shape(1),
      k.shape(2),
      q.shape(3),
      q.dtype(),
      scale_,
      window_,
      inputs.size() == 5);
  // In the order in which the launches name them: v is the last
  std::vector<mx::array> named = inputs;
  std::rotate(named.begin() + 2, named.begin() + 3, named.end());
  run_on_gpu(launches, stream(), named, outputs);
}

bool BlockAttention::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const BlockAttention&>(other);
  return scale_ == o.scale_ && window_ == o.window_;
}

void bind_block_attention(nb::module_& m) {
  m.def(
      "block_attention",
      &block_attention,
      nb::arg("q"),
      nb::arg("k"),
      nb::arg("v"),
      nb::arg("offset"),
      nb::arg("scale"),
      nb::arg("window").none(),
      nb::arg("start").none());
  m.def(
      "block_attention_plan",
      &block_attention_plan,
      nb::arg("B"),
      nb::arg("T"),
      nb::arg("H"),
      nb::arg("K"),
      nb::arg("C"),
      nb::arg("D"));
  m.def(
      "block_attention_has_launch", &block_attention_has_launch, nb::arg("T"));
  m.def(
      "block_attention_launches",
      &block_attention_launches,
      nb::arg("B"),
      nb::arg("T"),
      nb::arg("H"),
      nb::arg("K"),
      nb::arg("C"),
      nb::arg("D"),
      nb::arg("dtype"),
      nb::arg("scale"),
      nb::arg("window").none(),
      nb::arg("has_start"));
}

} // namespace pyengine
