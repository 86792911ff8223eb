// rows_cpu: float32 rows, permuted to the order in which weights unpack.

#include "rows_cpu.h"

#include "simd.h"

namespace pyengine::PYENGINE_ISA {

namespace {

template <typename T>
void convert(const T* from, int64_t stride, int width, float* to) {
  int k = 0;
  if (stride == 1) {
    for (; k + lanes <= width; k += lanes) {
      store(to + k, load(from + k));
    }
  }
  for (; k < width; ++k) {
    to[k] = to_float(from[k * stride]);
  }
  for (; k < padded_width(width); ++k) {
    to[k] = 0.0f;
  }
}

// Within each run of 16 * step elements: 0, step, 2 * step, ..., then 1, ...
void interleave(int step, int width, float* row) {
  int run = lanes * step;
  float permuted[lanes * 4];
  for (int k = 0; k < padded_width(width); k += run) {
    for (int i = 0; i < run; ++i) {
      permuted[i % step * lanes + i / step] = row[k + i];
    }
    memcpy(row + k, permuted, run * sizeof(float));
  }
}

} // namespace

void load_row(
    const void* from,
    Storage storage,
    int64_t stride,
    int width,
    Order order,
    float* to) {
  switch (storage) {
    case Storage::float32:
      convert(static_cast<const float*>(from), stride, width, to);
      break;
    case Storage::float16:
      convert(static_cast<const Half*>(from), stride, width, to);
      break;
    case Storage::bfloat16:
      convert(static_cast<const BFloat*>(from), stride, width, to);
      break;
  }
  if (order != Order::plain) {
    interleave(int(order), width, to);
  }
}

} // namespace pyengine::PYENGINE_ISA
