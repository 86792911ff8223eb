// move_rows: keys and values of the rows of a tree that are kept, to the places
// that plain steps would have given them, in place.

#include <cstring>

#include "../metal/positions.h"
#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "op.h"

namespace pyengine {

namespace {

// Inputs: rows, lengths, tables, kept, keys, values.
struct MoveRows {
  static constexpr const char* op = "move_rows";
  static constexpr int word = 4; // bytes that a thread of a GPU copies
  bool operator==(const MoveRows&) const = default;

  void share(const Arrays& in, Arrays& out) const {
    for (int i : {4, 5}) {
      share_arena(op, "keys and values", in[i], out[i - 4]);
    }
  }

  bool empty(const Arrays& in, const Arrays& out) const {
    return in[0].size() == 0 || out[0].size() == 0;
  }

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    const auto& keys = out[0];
    int P = keys.shape(0), K = keys.shape(1);
    int Q = in[0].shape(0), A = in[0].shape(1), N = in[2].shape(1);
    size_t words = line_bytes(keys) / word;
    if (!fits_grid(words * size_t(K) * size_t(Q))) {
      return {};
    }
    auto whole = [](const char* name, mx::Shape shape) {
      return Buffer::array(Role::in, name, std::move(shape), mx::int32);
    };
    auto arena = [&](const char* name) {
      return Buffer::array(Role::inout, name, keys.shape(), keys.dtype(), word);
    };
    auto launch = elementwise_launch(op, op, words * size_t(K));
    launch.grid[1] = Q;
    launch.buffers = {
        whole("rows", {Q, A}),
        whole("lengths", {Q}),
        whole("tables", {Q, N}),
        whole("kept", {Q}),
        arena("keys"),
        arena("values"),
        Buffer::scalar("P", uint32_t(P)),
        Buffer::scalar("K", uint32_t(K)),
        Buffer::scalar("Q", uint32_t(Q)),
        Buffer::scalar("N", uint32_t(N)),
        Buffer::scalar("A", uint32_t(A)),
        Buffer::scalar("words", uint32_t(words))};
    return {launch};
  }

  // Since it only moves bytes, it has no kernel per instruction set.
  auto task(const Arrays& in, Arrays& out) const {
    return [rows = Contiguous(in[0]),
            lengths = Contiguous(in[1]),
            tables = Contiguous(in[2]),
            kept = Contiguous(in[3]),
            keys = out[0].data<char>(),
            values = out[1].data<char>(),
            Q = in[0].shape(0),
            A = in[0].shape(1),
            N = in[2].shape(1),
            P = out[0].shape(0),
            K = out[0].shape(1),
            bytes = line_bytes(out[0])] {
      auto* table = tables.get<int32_t>();
      for (int s = 0; s < Q; ++s) {
        int length = lengths.get<int32_t>()[s];
        for (int j = 0; j < std::min(A, kept.get<int32_t>()[s]); ++j) {
          int row = rows.get<int32_t>()[s * int64_t(A) + j];
          int to = page_behind(table, Q, N, P, s, length, j);
          int from = page_behind(table, Q, N, P, s, length, row);
          if (to < 0 || from < 0 || row == j) {
            continue;
          }
          for (int64_t head = 0; head < K; ++head) {
            auto line = [&](int page, int position) {
              int64_t first = (page * int64_t(K) + head) * page_size;
              return (first + position % page_size) * bytes;
            };
            int64_t source = line(from, length + row);
            int64_t target = line(to, length + j);
            std::memmove(keys + target, keys + source, bytes);
            std::memmove(values + target, values + source, bytes);
          }
        }
      }
    };
  }

 private:
  static size_t line_bytes(const mx::array& arena) {
    return size_t(arena.shape(3)) * arena.itemsize();
  }
};

Arrays move_rows(
    const mx::array& keys, // [P, K, 64, D]
    const mx::array& values, // [P, K, 64, D]
    const mx::array& lengths, // int32 [Q]
    const mx::array& tables, // int32 [Q, N]
    const mx::array& rows, // int32 [Q, A]
    const mx::array& kept) { // int32 [Q]
  constexpr auto op = MoveRows::op;
  check_storage_dtype(op, "keys", keys);
  check_arena(op, "keys", keys);
  check(keys.shape(3) % 2 == 0, op, "D", "be even", keys.shape(3));
  check_shape(op, "values", values, keys.shape());
  check_dtype(op, "values", values, keys.dtype(), "have the dtype of keys");
  check(rows.ndim() == 2, op, "rows", "have shape [Q, A]", rows.shape());
  check_dtype(op, "rows", rows, mx::int32, "be int32");
  int Q = rows.shape(0);
  check_array(op, "lengths", lengths, mx::int32, {Q});
  check(tables.ndim() == 2, op, "tables", "have shape [Q, N]", tables.shape());
  check_array(op, "tables", tables, mx::int32, {Q, tables.shape(1)});
  check_array(op, "kept", kept, mx::int32, {Q});
  return lazy_results(
      MoveRows{},
      {keys.shape(), values.shape()},
      {keys.dtype(), keys.dtype()},
      {rows, lengths, tables, kept, keys, values});
}

} // namespace

void bind_move_rows(nb::module_& m) {
  m.def(
      "move_rows",
      &move_rows,
      "keys"_a,
      "values"_a,
      "lengths"_a,
      "tables"_a,
      "rows"_a,
      "kept"_a);
}

} // namespace pyengine
