// copy_pages: whole pages of keys or values within an arena, in place.

#include <cstring>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "op.h"

namespace pyengine {

namespace {

// Inputs: sources, targets, arena.
struct CopyPages {
  static constexpr const char* op = "copy_pages";
  static constexpr int word = 16; // bytes that a thread of a GPU copies
  bool operator==(const CopyPages&) const = default;

  void share(const Arrays& in, Arrays& out) const {
    share_arena(op, "arena", in[2], out[0]);
  }

  bool empty(const Arrays& in, const Arrays& out) const {
    return in[0].size() == 0 || out[0].size() == 0;
  }

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    const auto& arena = out[0];
    int pairs = in[0].shape(0);
    size_t words = page_bytes(arena) / word;
    if (!fits_grid(words * size_t(pairs))) {
      return {};
    }
    auto launch = elementwise_launch(op, op, words);
    launch.grid[1] = pairs;
    launch.buffers = {
        Buffer::array(Role::in, "sources", {pairs}, mx::int32),
        Buffer::array(Role::in, "targets", {pairs}, mx::int32),
        Buffer::array(Role::inout, "arena", arena.shape(), arena.dtype(), word),
        Buffer::scalar("P", uint32_t(arena.shape(0))),
        Buffer::scalar("words", uint32_t(words))};
    return {launch};
  }

  // Since it only moves bytes, it has no kernel per instruction set.
  auto task(const Arrays& in, Arrays& out) const {
    return [sources = Contiguous(in[0]),
            targets = Contiguous(in[1]),
            arena = out[0].data<char>(),
            pairs = in[0].shape(0),
            P = out[0].shape(0),
            bytes = page_bytes(out[0])] {
      auto *from = sources.get<int32_t>(), *to = targets.get<int32_t>();
      for (int i = 0; i < pairs; ++i) {
        bool known = is_page(from[i], P) && is_page(to[i], P);
        if (known && from[i] != to[i]) {
          std::memcpy(arena + to[i] * bytes, arena + from[i] * bytes, bytes);
        }
      }
    };
  }

 private:
  static size_t page_bytes(const mx::array& arena) {
    return arena.nbytes() / size_t(arena.shape(0));
  }
};

mx::array copy_pages(
    const mx::array& arena, // [P, K, 64, D]
    const mx::array& sources, // int32 [n]
    const mx::array& targets) { // int32 [n]
  constexpr auto op = CopyPages::op;
  check_storage_dtype(op, "arena", arena);
  check_arena(op, "arena", arena);
  check(sources.ndim() == 1, op, "sources", "have shape [n]", sources.shape());
  check_dtype(op, "sources", sources, mx::int32, "be int32");
  check_array(op, "targets", targets, mx::int32, sources.shape());
  return lazy_result(
      CopyPages{}, arena.shape(), arena.dtype(), {sources, targets, arena});
}

} // namespace

void bind_copy_pages(nb::module_& m) {
  m.def("copy_pages", &copy_pages, "arena"_a, "sources"_a, "targets"_a);
}

} // namespace pyengine
