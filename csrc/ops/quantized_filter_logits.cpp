// quantized_filter_logits: quantized_matmul to float32, softcap and
// filter_logits in one op that never holds a row of logits. Here is how heaps
// are handed to threads; the arithmetic is in quantized_filter_logits_cpu.cpp.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "filter.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "op.h"
#include "ops/quantized_filter_logits_cpu.h"
#include "quantized.h"

namespace pyengine {

namespace {

using Args = QuantizedFilterLogitsArgs;

// Each thread takes one group of columns after the other into heaps of its own.
// Which groups these are is chance; what remains of all heaps is not.
void run_slice(const Plan& plan, const Args& args) {
  int V = args.filter.V, M = args.matmul.M;
  int heaps = std::min(threads_for(plan.work), plan.groups);
  std::vector<Kept> kept(size_t(heaps) * M);
  std::atomic<int> next{0};
  Pool::shared().run(heaps, [&](int heap) {
    static thread_local Scratch of_group;
    float* scratch = of_group.floats(plan.group_scratch);
    for (int group; (group = next.fetch_add(1)) < plan.groups;) {
      int begin = group * plan.columns;
      int end = std::min(begin + plan.columns, V);
      PYENGINE_PICK_KERNEL(quantized_filter_logits_columns)
      (args, begin, end, scratch, &kept[heap * M]);
    }
  });
  PYENGINE_PICK_KERNEL(quantized_filter_logits_finish)(
      args, kept.data(), heaps);
}

// The tiles of metal/quantized_filter_logits.metal.
constexpr int threadgroup_bytes = 30720 - 512; // without its own variables
constexpr int entry_bytes = 6;
constexpr int max_room = 512;
constexpr int max_slices = 512; // more threadgroups than this help no GPU
constexpr int max_slice = 1 << 16;

Tile tile_of(int bits) {
  return {4, bits == 4 ? 16 : 8};
}

int tile_columns(int bits) {
  return tile_of(bits).simds * tile_of(bits).columns;
}

// Columns of a slice, a multiple of the tile's.
int slice_columns(int V, int n, int bits) {
  int columns = tile_columns(bits);
  int most = std::min(max_slices, max_merged / n);
  int slice = std::max((V + most - 1) / most, 4 * columns);
  return (slice + columns - 1) / columns * columns;
}

// The tile's launch, without buffers.
Launch tile_launch(
    const std::string& op,
    int T,
    int V,
    int E,
    mx::Dtype dtype,
    int group_size,
    int bits) {
  auto kernel = op + "_" + dtype_name(dtype) + "_" + std::to_string(bits);
  auto launch = matmul_launch(op, kernel, T, V, E, tile_of(bits));
  launch.constants[3] = group_size;
  // Scales and biases: 512 bytes for every four columns (metal/quantized.h).
  launch.threadgroup_memory.emplace_back(1, tile_columns(bits) / 4 * 512);
  return launch;
}

// Entries of a row's list: n, and as many columns as come before it is cut
// again. 0: not even one tile fits.
int list_room(const Launch& launch, int R, int n, int bits) {
  int columns = tile_columns(bits);
  int left = threadgroup_bytes;
  for (auto [index, bytes] : launch.threadgroup_memory) {
    left -= bytes;
  }
  int room = left / (entry_bytes * std::clamp(R, 1, max_rows));
  room = std::min({room, max_room, n + 2 * columns + 7}) / 8 * 8;
  return room < n + columns ? 0 : room;
}

// Inputs: x, w, scales, biases, then settings, mask and edits (add_filter).
// Outputs: ids, probabilities, flags.
struct QuantizedFilterLogits {
  static constexpr const char* op = "quantized_filter_logits";
  int group_size;
  int bits;
  float softcap; // 0: none
  bool operator==(const QuantizedFilterLogits&) const = default;

  // Two: the candidates of slices of the vocabulary, which merge_candidates
  // merges. None where a row's list does not fit in threadgroup memory.
  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int R = in[0].shape(0), V = in[1].shape(0), E = in[0].shape(1);
    FilterInputs at(in, 4);
    int Q = in[at.temperature].shape(0), n = out[0].shape(1);
    auto dtype = in[0].dtype();
    auto launch = tile_launch(op, R, V, E, dtype, group_size, bits);
    int slice = slice_columns(V, n, bits);
    int slices = (V + slice - 1) / slice;
    int rows = std::clamp(R, 1, max_rows);
    int room = list_room(launch, R, n, bits);
    if (!has_short_rows(in[0]) || slice > max_slice || room == 0) {
      return {};
    }
    int entries = room * rows;
    launch.constants.insert(
        {{4, softcap > 0}, {5, at.edited}, {6, room}, {10, at.masked}});
    launch.grid[0] = slices;
    launch.threadgroup_memory.emplace_back(2, 4 * entries);
    launch.threadgroup_memory.emplace_back(3, 2 * entries);
    launch.buffers = {Buffer::array(Role::in, "x", {R, E}, dtype, 16)};
    add_matrix(launch, "", {V}, E, dtype, group_size, bits);
    launch.buffers.push_back(
        Buffer::array(Role::out, "candidates", {R, slices, n}, mx::uint64));
    launch.buffers.push_back(
        Buffer::array(Role::out, "slice_flags", {R, slices}, mx::uint32));
    add_scalars(
        launch,
        {{"M", R}, {"N", V}, {"K", E}, {"slice", slice}, {"n", n}, {"Q", Q}});
    launch.buffers.push_back(Buffer::scalar("cap", softcap));
    add_rows(launch, in, at, V);
    return {launch, merge_candidates_launch(R, Q, slices, n)};
  }

  auto task(const Arrays& in, Arrays& out) const {
    const auto& x = in[0];
    int V = in[1].shape(0);
    Args args = {};
    args.matmul = quantized_args(&in[1], x, group_size, bits);
    args.softcap = softcap;
    Rows rows(x);
    auto plan =
        quantized_matmul_plan(x.shape(0), V, x.shape(1), group_size, bits);
    return [rows = std::move(rows),
            state = FilterState(in, 4, V, out),
            order = quantized_order(bits),
            plan,
            args]() mutable {
      args.filter = state.get();
      static thread_local Scratch of_slice;
      float* x = of_slice.floats(plan.scratch);
      args.matmul.x = x;
      for (int slice = 0; slice < plan.slices; ++slice) {
        args.first = slice * max_rows;
        args.matmul.M = std::min(rows.count() - args.first, max_rows);
        for (int m = 0; m < args.matmul.M; ++m) {
          rows.load(args.first + m, order, args.matmul.M, m, x);
        }
        run_slice(plan, args);
      }
    };
  }
};

// As filter_logits, n at most 256.
Arrays quantized_filter_logits(
    const mx::array& x, // [R, E]
    const mx::array& w, // [V, E * bits / 32]
    const mx::array& scales, // [V, E / group_size]
    const mx::array& biases,
    Integer group_size,
    Integer bits,
    std::optional<float> softcap,
    const mx::array& temperature, // [Q]
    const mx::array& top_k, // [Q]
    const mx::array& top_p, // [Q]
    const mx::array& min_p, // [Q]
    const mx::array& owner, // [R]
    Integer width,
    const std::optional<mx::array>& mask, // [R, ceil(V / 32)]
    const std::optional<mx::array>& edit_ids, // [Q, L]
    const std::optional<mx::array>& edit_factors, // [R, L]
    const std::optional<mx::array>& edit_deltas) { // [R, L]
  constexpr auto op = QuantizedFilterLogits::op;
  check_quantized(op, x, {{"", w, scales, biases}}, group_size, bits);
  check(x.ndim() == 2, op, "x", "have shape [R, E]", x.shape());
  check(w.shape(0) > 0, op, "w", "have at least 1 row", w.shape());
  int rows = x.shape(0), V = w.shape(0);
  check(
      !softcap || *softcap > 0,
      op,
      "softcap",
      "be above 0",
      softcap.value_or(0));
  FilterSettings settings = {temperature, top_k, top_p, min_p, owner};
  check_filter(op, rows, settings, 1, width);
  int Q = temperature.shape(0);
  auto edits = checked_edits(op, rows, Q, edit_ids, edit_factors, edit_deltas);
  Arrays inputs = {
      x, made_contiguous(w), made_contiguous(scales), made_contiguous(biases)};
  add_filter(settings, checked_mask(op, rows, V, mask), edits, inputs);
  mx::Shape shape = {rows, std::min<int>(width, V)};
  return lazy_results(
      QuantizedFilterLogits{group_size, bits, softcap.value_or(0)},
      {shape, shape, {rows}},
      {mx::int32, mx::float32, mx::int32},
      inputs);
}

} // namespace

void bind_quantized_filter_logits(nb::module_& m) {
  m.def(
      "quantized_filter_logits",
      &quantized_filter_logits,
      "x"_a,
      "w"_a,
      "scales"_a,
      "biases"_a,
      "group_size"_a,
      "bits"_a,
      "softcap"_a.none(),
      "temperature"_a,
      "top_k"_a,
      "top_p"_a,
      "min_p"_a,
      "owner"_a,
      "width"_a,
      "mask"_a.none() = nb::none(),
      "edit_ids"_a.none() = nb::none(),
      "edit_factors"_a.none() = nb::none(),
      "edit_deltas"_a.none() = nb::none());
}

} // namespace pyengine
