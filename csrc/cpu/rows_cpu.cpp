// rows_cpu: float32 rows, permuted to the order in which weights unpack.

#include "cpu/rows_cpu.h"

#include "cpu/lanes.h"
#include "cpu/planes.h"

namespace pyengine::PYENGINE_ISA {

namespace {

// Elements k, k + step, ... as 16 lanes; 0 where the row has ended.
template <typename T>
PYENGINE_INLINE F32x16
gather(const T* from, int64_t stride, int width, int k, int step) {
  if (stride == 1 && step == 1 && k + lanes <= width) {
    return load(from + k);
  }
  float values[lanes];
  for (int i = 0; i < lanes; ++i) {
    int at = k + i * step;
    values[i] = at < width ? to_float(from[at * stride]) : 0.0f;
  }
  return load(values);
}

// Calls put(sixteen) for the row in this order: a run of 16 * step elements
// gives every first, then every second, ...
template <typename T, typename Put>
PYENGINE_INLINE void
walk_row(const T* from, int64_t stride, int width, int step, const Put& put) {
  for (int k = 0; k < padded_width(width); k += lanes * step) {
    for (int i = 0; i < step; ++i) {
      put(gather(from, stride, width, k + i, step));
    }
  }
}

constexpr int step_of(Order order) {
  return order == Order::quads ? 4 : order == Order::pairs ? 2 : 1;
}

} // namespace

void load_row(
    const void* from,
    Storage storage,
    int64_t stride,
    int width,
    Order order,
    int rows,
    int row,
    float* x) {
  with_storage(storage, [&]<typename T>(T*) {
    auto* values = static_cast<const T*>(from);
#if defined(__AVX512VNNI__)
    if (order != Order::dense && takes_planes(storage)) {
      PlanesAt at = {reinterpret_cast<char*>(x), rows};
      F32x16 chunk[chunk_k / lanes];
      int part = 0;
      int step = order == Order::pairs ? 2 : 1; // six bits unpack in order
      walk_row(values, stride, width, step, [&](F32x16 a) {
        chunk[part % 4] = a;
        if (++part % 4 == 0) {
          put_chunk(at, row, part / 4 - 1, chunk);
        }
      });
      return;
    }
#endif
    float* to = x + lanes * row;
    walk_row(values, stride, width, step_of(order), [&](F32x16 a) {
      store(to, a);
      to += lanes * rows;
    });
  });
}

void store_nan(void* to, Storage storage, int64_t at, int64_t count) {
  F32x16 nan = broadcast(__builtin_nanf(""));
  for_lanes(count, [&](int64_t k, int some) {
    store(to, storage, at + k, nan, some);
  });
}

} // namespace pyengine::PYENGINE_ISA
