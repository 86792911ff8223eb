#pragma once
// lanes.h: walking rows of any width and any storage sixteen lanes at a time.

#include "cpu/simd.h"

namespace pyengine::PYENGINE_ISA {

// Calls work with a null pointer of the storage's type.
template <typename Work>
PYENGINE_INLINE void with_storage(Storage storage, const Work& work) {
  switch (storage) {
    case Storage::float32:
      return work(static_cast<float*>(nullptr));
    case Storage::float16:
      return work(static_cast<Half*>(nullptr));
    case Storage::bfloat16:
      return work(static_cast<BFloat*>(nullptr));
  }
}

// Calls step(k, count) for each vector of a row; count is below 16 only in a
// last, short one.
template <typename Step>
PYENGINE_INLINE void for_lanes(int64_t width, const Step& step) {
  int64_t k = 0;
  for (; k + lanes <= width; k += lanes) {
    step(k, lanes);
  }
  if (k < width) {
    step(k, int(width - k));
  }
}

template <typename T>
PYENGINE_INLINE F32x16 load_some(const T* from, int count) {
  return count == lanes ? load(from) : load(from, count);
}

template <typename T>
PYENGINE_INLINE void store_some(T* to, F32x16 a, int count) {
  if (count == lanes) {
    store(to, a);
  } else {
    store(to, a, count);
  }
}

} // namespace pyengine::PYENGINE_ISA
