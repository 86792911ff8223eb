// block_attention: softmax(scale * q @ k.T + mask) @ v for the rows of several
// pieces against the pages of each one's sequence. Here are the sharing of work
// and the Metal launches; the arithmetic is in block_attention_cpu.cpp.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

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
struct ArenaView {
  explicit ArenaView(const mx::array& a) : contiguous(a) {
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
  int newest = rows.position + rows.positions - 1;
  int oldest = oldest_seen(rows.position, args.window);
  return {oldest / attention_span, newest / attention_span};
}

// Floats for R rows of q and `states` softmax states.
size_t scratch_size(int64_t R, int64_t D, int64_t states) {
  return size_t(R * D + states * attention_state_size(R, D));
}

// One item, a wave of its spans at a time, which share the threads. Spans are
// folded in their order, whatever the wave.
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

// What one thread does: a slice of one piece for one key head.
struct Item {
  AttentionRows rows;
  int64_t work; // multiply-adds
  int64_t spans;
};

// What is told of the rows of a tree, from a piece's first row on.
struct Tree {
  const int32_t* depths = nullptr; // null where there is none
  const int32_t* ancestors = nullptr;
  int A = 0;

  // Whether each row of a piece has a depth, and its ancestors are rows of it.
  bool fits(int count) const {
    for (int i = 0; depths && i < count; ++i) {
      if (depths[i] < 0 || depths[i] >= std::min(A, count)) {
        return false;
      }
      for (int j = 0; j <= depths[i]; ++j) {
        int row = ancestors[i * A + j];
        if (row < 0 || row >= count) {
          return false;
        }
      }
    }
    return true;
  }
};

// Whether a piece has positions, and pages that hold all that its rows see.
bool can_attend(
    const BlockAttentionArgs& args,
    int length,
    int count,
    const int32_t* table) {
  if (!attends(length, count, args.N, args.window)) {
    return false;
  }
  int first = oldest_seen(length, args.window) / page_size;
  int last = (length + count - 1) / page_size;
  for (int page = first; page <= last; ++page) {
    if (!is_page(table[page % args.N], args.P)) {
      return false;
    }
  }
  return true;
}

void add_items(
    const BlockAttentionArgs& args,
    int row,
    int length,
    int count,
    const int32_t* table,
    const Tree& tree,
    std::vector<Item>& items) {
  for (int first = 0; first < count; first += max_rows) {
    int positions = std::min(max_rows, count - first);
    AttentionRows rows = {
        .head = 0,
        .row = row + first,
        .positions = positions,
        .position = length + first,
        .table = table,
        .depths = tree.depths,
        .ancestors = tree.ancestors,
        .A = tree.A};
    auto [oldest, newest] = spans_of(args, rows);
    int64_t seen = rows.position + positions -
        int64_t(oldest_seen(rows.position, args.window));
    int64_t columns = int64_t(args.H / args.K) * args.D;
    for (rows.head = 0; rows.head < args.K; ++rows.head) {
      items.push_back(
          {rows, 2 * positions * columns * seen, newest - oldest + 1});
    }
  }
}

// Whether an item keeps its thread at work longer than all threads would take
// for this item, span by span, and the rest of `work` after it.
bool outweighs(const Item& item, int64_t work, int threads) {
  int64_t rounds = (item.spans + threads - 1) / threads;
  int64_t shared = item.work / item.spans * rounds;
  return shared + (work - item.work) / threads < item.work;
}

// Longest first, so that the last to end ends early.
void attend_all(const BlockAttentionArgs& args, std::vector<Item>& items) {
  auto longer = [](const Item& a, const Item& b) { return a.work > b.work; };
  std::stable_sort(items.begin(), items.end(), longer);
  int64_t work = 0;
  for (const auto& item : items) {
    work += item.work;
  }
  int threads = Pool::shared().threads();
  const Item* next = items.data();
  const Item* end = next + items.size();
  while (next < end && work >= work_worth_waves &&
         outweighs(*next, work, threads)) {
    attend(args, next->rows, 2 * threads);
    work -= next++->work;
  }
  auto one = [&](int i) { attend(args, next[i].rows, 1); };
  Pool::shared().run(int(end - next), one, threads_for(work));
}

void run(
    const BlockAttentionArgs& args,
    const std::vector<int>& counts,
    const int32_t* lengths,
    const int32_t* tables,
    Tree tree) {
  std::vector<Item> items;
  int64_t width = int64_t(args.H) * args.D;
  int row = 0;
  for (size_t s = 0; s < counts.size(); ++s) {
    const int32_t* table = tables + s * args.N;
    if (can_attend(args, lengths[s], counts[s], table) &&
        tree.fits(counts[s])) {
      add_items(args, row, lengths[s], counts[s], table, tree, items);
    } else {
      // No error: after some hundred tasks that throw one, MLX waits for ever
      PYENGINE_PICK_KERNEL(store_nan)
      (args.out, args.storage, row * width, counts[s] * width);
    }
    row += counts[s];
    if (tree.depths) {
      tree.depths += counts[s];
      tree.ancestors += int64_t(counts[s]) * tree.A;
    }
  }
  attend_all(args, items);
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

// The spans that the visible positions of a slice may touch: those of N pages,
// and of a window.
int spans_needed(int N, int positions, std::optional<int> window) {
  constexpr int span_pages = attention_span / page_size;
  N = std::min(N, max_positions / page_size);
  if (!window) {
    return pieces(N, span_pages);
  }
  int64_t visible = int64_t(*window) - 1 + positions;
  int64_t touched = (visible + attention_span - 2) / attention_span + 1;
  return int(std::min<int64_t>((N + span_pages - 2) / span_pages + 1, touched));
}

// Scores, what spans make of the values, and the fold of these, for all slices
// of a call. Grids follow from shapes alone: where pieces stand is read on the
// device.
class AttentionLaunches {
 public:
  AttentionLaunches(
      const Arrays& in,
      const std::vector<int>& counts,
      float scale,
      std::optional<int> window)
      : q_(in[0]),
        keys_(in[1]),
        tables_(in[3]),
        ancestors_(in.size() > 6 ? &in[6] : nullptr),
        dtype_(in[0].dtype()) {
    int H = q_.shape(1), K = keys_.shape(1), N = tables_.shape(1);
    int positions = add_items(counts, H / K);
    most_ = positions * (H / K);
    for (const auto& item : items_) {
      tile_ = std::max(tile_, item.rows);
    }
    params_ = {
        .H = H,
        .P = keys_.shape(0),
        .K = K,
        .D = q_.shape(2),
        .N = N,
        .tiles = pieces(most_, tile_rows),
        .keys = row_simds() <= 4 ? 64 : 32,
        .spans = spans_needed(N, positions, window),
        .window = window.value_or(no_window),
        .ancestors = ancestors_ ? ancestors_->shape(1) : 0,
        .scale = scale,
        .minus_zero = -0.0f};
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
        Buffer::array(Role::in, "q", q_.shape(), dtype_, 16),
        arena("keys"),
        lengths(),
        tables(),
        score_list(Role::out),
        params(),
        items()};
    launch.threadgroup_memory = {{0, staged * tile_bytes / itemsize() * 4}};
    return launch;
  }

  Launch values() const {
    int simds = pieces(tile_, value_rows);
    auto launch = stage(
        "values", params_.spans * pieces(params_.D, slice_columns), simds);
    launch.buffers = {
        arena("values"),
        lengths(),
        tables(),
        score_list(Role::in),
        sum_list(Role::out),
        state_list(Role::out),
        params(),
        items()};
    add_tree(launch);
    launch.threadgroup_memory = {
        {0, simds * attention_chunk * value_rows * 4},
        {1, value_bytes / itemsize() * 4}};
    return launch;
  }

  Launch fold() const {
    auto launch = kernel(
        "fold",
        {most_, params_.K, int(items_.size())},
        round_up(params_.D / 4, 32));
    launch.buffers = {
        lengths(),
        tables(),
        sum_list(Role::in),
        state_list(Role::in),
        Buffer::array(Role::out, "out", q_.shape(), dtype_),
        params(),
        items()};
    add_tree(launch);
    return launch;
  }

 private:
  // All slices of all pieces; returns the positions of the longest.
  int add_items(const std::vector<int>& counts, int G) {
    int row = 0, most = 0;
    for (int piece = 0; piece < int(counts.size()); ++piece) {
      for (int first = 0; first < counts[piece]; first += max_rows) {
        int positions = std::min(counts[piece] - first, max_rows);
        int rows = rows_of_a_tile(positions * G);
        items_.push_back(
            {piece, counts[piece], row + first, first, positions, rows});
        most = std::max(most, positions);
      }
      row += counts[piece];
    }
    return most;
  }

  // R rows of a head in tiles of equal size.
  static int rows_of_a_tile(int R) {
    int tiles = pieces(R, tile_rows);
    return tiles == 1 ? R : round_up(pieces(R, tiles), value_rows);
  }

  int itemsize() const {
    return int(mx::size_of(dtype_));
  }

  int row_simds() const {
    return pieces(tile_, score_rows);
  }

  // Without buffers.
  Launch kernel(const char* name, std::array<int, 3> grid, int threads) const {
    std::string library = "block_attention";
    auto host_name = library + "_" + name + "_" + dtype_name(dtype_);
    Launch launch(library, host_name, grid, {threads, 1, 1});
    launch.constants = {{0, ancestors_ != nullptr}};
    return launch;
  }

  void add_tree(Launch& launch) const {
    if (ancestors_) {
      int R = q_.shape(0);
      auto array = [](const char* name, mx::Shape shape) {
        return Buffer::array(Role::in, name, std::move(shape), mx::int32);
      };
      launch.buffers.push_back(array("depths", {R}));
      launch.buffers.push_back(array("ancestors", ancestors_->shape()));
    }
  }

  // Scores or values: so many threadgroups per tile of rows.
  Launch stage(const char* name, int groups, int simds) const {
    return kernel(
        name,
        {groups, params_.K, int(items_.size()) * params_.tiles},
        32 * std::max(simds, loading_simds));
  }

  Buffer arena(const char* name) const {
    auto buffer = Buffer::array(Role::in, name, keys_.shape(), dtype_, 16);
    buffer.state = true;
    return buffer;
  }

  Buffer lengths() const {
    return Buffer::array(Role::in, "lengths", {tables_.shape(0)}, mx::int32);
  }

  Buffer tables() const {
    return Buffer::array(Role::in, "tables", tables_.shape(), mx::int32);
  }

  // What one launch leaves for the next.
  Buffer score_list(Role role) const {
    int width = params_.spans * attention_span;
    mx::Shape shape = {q_.shape(0), params_.H, width};
    return Buffer::array(role, "scores", std::move(shape), mx::float32, 16);
  }

  Buffer sum_list(Role role) const {
    mx::Shape shape = {q_.shape(0), params_.H, params_.spans, params_.D};
    return Buffer::array(role, "sums", std::move(shape), mx::float32, 16);
  }

  Buffer state_list(Role role) const {
    mx::Shape shape = {q_.shape(0), params_.H, params_.spans, 2};
    return Buffer::array(role, "states", std::move(shape), mx::float32);
  }

  template <typename T>
  static Buffer constants(const char* name, const T* from, size_t count) {
    std::string data(reinterpret_cast<const char*>(from), count * sizeof(T));
    return {name, Role::bytes, {}, mx::uint32, 4, std::move(data)};
  }

  Buffer params() const {
    return constants("params", &params_, 1);
  }

  Buffer items() const {
    return constants("items", items_.data(), items_.size());
  }

  const mx::array& q_;
  const mx::array& keys_;
  const mx::array& tables_;
  const mx::array* ancestors_; // of a tree
  mx::Dtype dtype_;
  std::vector<BlockAttentionItem> items_;
  BlockAttentionParams params_;
  int most_; // rows of a key head in the largest item
  int tile_ = 0; // rows of the largest tile
};

// Inputs: q, keys, lengths, tables, values; depths and ancestors of trees.
struct BlockAttention {
  static constexpr const char* op = "block_attention";
  std::vector<int> counts; // rows of each piece
  float scale;
  std::optional<int> window;
  bool operator==(const BlockAttention&) const = default;

  // Three for all pieces. Longer calls are prefill, and MLX's; those of no
  // pages are NaN.
  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    bool no_pages = in[1].size() == 0 || in[3].size() == 0;
    if (in[0].shape(0) > max_launch_rows || no_pages) {
      return {};
    }
    AttentionLaunches all(in, counts, scale, window);
    return {all.scores(), all.values(), all.fold()};
  }

  auto task(const Arrays& in, Arrays& out) const {
    const auto &q = in[0], &keys = in[1], &tables = in[3];
    BlockAttentionArgs args = {};
    args.out = out[0].data<void>();
    args.storage = storage_of(q.dtype());
    args.H = q.shape(1);
    args.P = keys.shape(0);
    args.K = keys.shape(1);
    args.D = q.shape(2);
    args.N = tables.shape(1);
    args.window = window.value_or(no_window);
    args.scale = scale;
    return [q = Contiguous(q),
            k = ArenaView(keys),
            v = ArenaView(in[4]),
            lengths = Contiguous(in[2]),
            tables = Contiguous(tables),
            depths = Contiguous(in.size() > 6 ? in[5] : in[2]),
            ancestors = Contiguous(in.size() > 6 ? in[6] : in[2]),
            A = in.size() > 6 ? in[6].shape(1) : 0,
            counts = counts,
            args]() mutable {
      args.q = q.get();
      args.k = k.get();
      args.v = v.get();
      std::copy_n(k.strides, 3, args.k_strides);
      std::copy_n(v.strides, 3, args.v_strides);
      Tree tree;
      if (A > 0) {
        tree = {depths.get<int32_t>(), ancestors.get<int32_t>(), A};
      }
      run(args, counts, lengths.get<int32_t>(), tables.get<int32_t>(), tree);
    };
  }
};

// As a shape, which messages can show.
mx::Shape checked_counts(const std::vector<Integer>& counts, int R) {
  constexpr auto op = BlockAttention::op;
  mx::Shape rows(counts.begin(), counts.end());
  int64_t total = 0;
  for (int count : rows) {
    check(count >= 1, op, "counts", "be at least 1 each", rows);
    total += count;
  }
  if (total != R) {
    fail(op, "counts", "be R " + std::to_string(R) + " together", rows);
  }
  return rows;
}

void check_tree(
    int R,
    const mx::Shape& counts,
    const std::optional<mx::array>& depths,
    const mx::array& ancestors) {
  constexpr auto op = BlockAttention::op;
  if (!depths) {
    fail(op, "depths", "stand beside ancestors", "None");
  }
  check_array(op, "depths", *depths, mx::int32, {R});
  check(
      ancestors.ndim() == 2 && ancestors.shape(1) >= 1,
      op,
      "ancestors",
      "have shape [R, A]",
      ancestors.shape());
  check_array(op, "ancestors", ancestors, mx::int32, {R, ancestors.shape(1)});
  for (int count : counts) {
    check(
        count <= max_rows,
        op,
        "counts",
        "be at most 16 each with ancestors",
        counts);
  }
}

mx::array block_attention(
    const mx::array& q, // [R, H, D]
    const mx::array& keys, // [P, K, 64, D]
    const mx::array& values,
    const mx::array& lengths, // int32 [Q]
    const mx::array& tables, // int32 [Q, N]
    const std::vector<Integer>& counts, // [Q]
    float scale,
    std::optional<Integer> window,
    const std::optional<mx::array>& depths, // int32 [R]
    const std::optional<mx::array>& ancestors) { // int32 [R, A]
  constexpr auto op = BlockAttention::op;
  check_storage_dtype(op, "q", q);
  check(q.ndim() == 3, op, "q", "have shape [R, H, D]", q.shape());
  check(keys.ndim() == 4, op, "keys", "have shape [P, K, 64, D]", keys.shape());
  int H = q.shape(1);
  int D = q.shape(2);
  int K = keys.shape(1);
  check(
      D >= 16 && D % 16 == 0 && D <= attention_max_width,
      op,
      "D",
      "be a multiple of 16 and at most 512",
      D);
  check_shape(op, "keys", keys, {keys.shape(0), K, page_size, D});
  check_shape(op, "values", values, keys.shape());
  check_dtype(op, "keys", keys, q.dtype(), "have the dtype of q");
  check_dtype(op, "values", values, q.dtype(), "have the dtype of q");
  if (K == 0 || H % K != 0) {
    fail(op, "H", "be a multiple of K " + std::to_string(K), H);
  }
  auto rows = checked_counts(counts, q.shape(0));
  int Q = int(rows.size());
  check_array(op, "lengths", lengths, mx::int32, {Q});
  check(tables.ndim() == 2, op, "tables", "have shape [Q, N]", tables.shape());
  check_array(op, "tables", tables, mx::int32, {Q, tables.shape(1)});
  if (window) {
    check(
        window->wide() >= 1 && window->wide() <= INT32_MAX,
        op,
        "window",
        "be at least 1 and below 2**31",
        *window);
  }
  Arrays inputs = {q, keys, lengths, tables, values};
  if (ancestors) {
    check_tree(q.shape(0), rows, depths, *ancestors);
    inputs.insert(inputs.end(), {*depths, *ancestors});
  } else if (depths) {
    fail(op, "ancestors", "stand beside depths", "None");
  }
  return lazy_result(
      BlockAttention{{rows.begin(), rows.end()}, scale, window},
      q.shape(),
      q.dtype(),
      inputs);
}

} // namespace

void bind_block_attention(nb::module_& m) {
  m.def(
      "block_attention",
      &block_attention,
      "q"_a,
      "keys"_a,
      "values"_a,
      "lengths"_a,
      "tables"_a,
      "counts"_a,
      "scale"_a,
      "window"_a.none(),
      "depths"_a.none(),
      "ancestors"_a.none());
}

} // namespace pyengine
