// MLX's own quantised matrix-vector kernels, from the headers in its package,
// for the comparison in KERNELS.md. The headers need this order.
// clang-format off
#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/quantized_utils.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/quantized.h"
// clang-format on
