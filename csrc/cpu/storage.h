#pragma once
// storage.h: MLX's dtypes as the kernels name them.

#include "cpu/kernel.h"
#include "mlx/dtype.h"

namespace pyengine {

inline Storage storage_of(mlx::core::Dtype dtype) {
  return dtype == mlx::core::float32 ? Storage::float32
      : dtype == mlx::core::float16  ? Storage::float16
                                     : Storage::bfloat16;
}

} // namespace pyengine
