// rows_cpu: float32 rows, permuted to the order in which weights unpack.

#include "cpu/rows_cpu.h"

#include "cpu/lanes.h"

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

template <typename T>
void load_row(
    const T* from,
    int64_t stride,
    int width,
    int step,
    int rows,
    float* to) {
  // A run of 16 * step elements gives every first, then every second, ...
  for (int k = 0; k < padded_width(width); k += lanes * step) {
    for (int i = 0; i < step; ++i, to += lanes * rows) {
      store(to, gather(from, stride, width, k + i, step));
    }
  }
}

} // namespace

void load_row(
    const void* from,
    Storage storage,
    int64_t stride,
    int width,
    Order order,
    int rows,
    float* to) {
  with_storage(storage, [&]<typename T>(T*) {
    load_row(static_cast<const T*>(from), stride, width, int(order), rows, to);
  });
}

void store_nan(void* to, Storage storage, int64_t at, int64_t count) {
  F32x16 nan = broadcast(__builtin_nanf(""));
  for_lanes(count, [&](int64_t k, int some) {
    store(to, storage, at + k, nan, some);
  });
}

} // namespace pyengine::PYENGINE_ISA
