// write_cache: T rows of keys or values into a linear or ring cache, in place.

#include <cstring>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "op.h"

namespace pyengine {

namespace {

// Inputs: new, offset, cache.
struct WriteCache {
  static constexpr const char* op = "write_cache";
  bool operator==(const WriteCache&) const = default;

  // The output takes the cache's buffer whether or not anyone else still holds
  // it. MLX donates a buffer only when nothing queued reads it, so with
  // donation every write after a read would copy the cache.
  void share(const Arrays& in, Arrays& out) const {
    if (in[2].size() > 0 && !in[2].flags().row_contiguous) {
      throw std::runtime_error(
          "[write_cache] cache must be contiguous but got a strided view; "
          "allocate it with mx.zeros and keep only what write_cache returns.");
    }
    out[0].copy_shared_buffer(in[2]);
  }

  bool empty(const Arrays& in, const Arrays& out) const {
    return in[0].size() == 0;
  }

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    if (!fits_grid(in[0].size())) {
      return {};
    }
    const auto &rows = in[0].shape(), &cache = out[0].shape();
    auto dtype = out[0].dtype();
    int size = int(in[0].size());
    bool wide = mx::size_of(dtype) == 4;
    auto launch = elementwise_launch(
        op, std::string(op) + (wide ? "_uint32" : "_uint16"), size);
    launch.buffers = {
        Buffer::array(Role::in, "new", rows, dtype),
        Buffer::array(Role::in, "offset", {}, mx::int32),
        Buffer::array(Role::inout, "cache", cache, dtype),
        Buffer::scalar("size", uint32_t(size)),
        Buffer::scalar("T", uint32_t(rows[1])),
        Buffer::scalar("K", uint32_t(cache[1])),
        Buffer::scalar("C", uint32_t(cache[2])),
        Buffer::scalar("D", uint32_t(cache[3]))};
    return {launch};
  }

  // Since it only moves bytes, it has no kernel per instruction set.
  auto task(const Arrays& in, Arrays& out) const {
    return [rows = Contiguous(in[0]),
            offset = in[1].data<int32_t>(),
            to = out[0].data<char>(),
            B = out[0].shape(0),
            T = in[0].shape(1),
            K = out[0].shape(1),
            C = out[0].shape(2),
            row = size_t(out[0].shape(3)) * out[0].itemsize()] {
      auto* from = rows.get<char>();
      for (int b = 0; b < B; ++b) {
        for (int t = 0; t < T; ++t) {
          int slot = slot_of_row(*offset, t, C);
          for (int head = 0; head < K; ++head, from += row) {
            std::memcpy(
                to + ((int64_t(b) * K + head) * C + slot) * row, from, row);
          }
        }
      }
    };
  }
};

mx::array write_cache(
    const mx::array& cache, // [B, K, C, D]
    const mx::array& new_rows, // [B, T, K, D]
    const mx::array& offset) { // int32 []
  constexpr auto op = WriteCache::op;
  check_storage_dtype(op, "cache", cache);
  check(
      cache.ndim() == 4, op, "cache", "have shape [B, K, C, D]", cache.shape());
  check(
      new_rows.ndim() == 4,
      op,
      "new",
      "have shape [B, T, K, D]",
      new_rows.shape());
  int T = new_rows.shape(1);
  int C = cache.shape(2);
  check_shape(
      op, "new", new_rows, {cache.shape(0), T, cache.shape(1), cache.shape(3)});
  check_dtype(op, "new", new_rows, cache.dtype(), "have the dtype of cache");
  check_block(op, offset, T, C);
  return lazy_result(
      WriteCache{}, cache.shape(), cache.dtype(), {new_rows, offset, cache});
}

} // namespace

void bind_write_cache(nb::module_& m) {
  m.def("write_cache", &write_cache, "cache"_a, "new"_a, "offset"_a);
}

} // namespace pyengine
