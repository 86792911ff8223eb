// quantized_matmuls: x times two or three matrices in MLX's affine
// quantisation, in one launch. The arithmetic is that of
// quantized_matmul_cpu.cpp, whose columns stand here one matrix behind the
// other.

#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bindings.h"
#include "check.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "op.h"
#include "quantized.h"

namespace pyengine {

namespace {

// Columns [begin, end) of all matrices side by side: of each the part that lies
// within.
void columns(
    const std::vector<QuantizedMatmulArgs>& matrices,
    int first,
    int count,
    const float* x,
    int begin,
    int end,
    float* scratch) {
  for (const auto& matrix : matrices) {
    int from = std::max(begin, 0), to = std::min(end, matrix.N);
    if (from < to) {
      PYENGINE_PICK_KERNEL(quantized_matmul_columns)
      (at_rows(matrix, first, count, x), from, to, scratch);
    }
    begin -= matrix.N;
    end -= matrix.N;
  }
}

// Inputs: x, then w, scales and biases of each matrix.
struct QuantizedMatmuls {
  static constexpr const char* op = "quantized_matmuls";
  int group_size;
  int bits;
  bool operator==(const QuantizedMatmuls&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    constexpr const char* names[] = {"first_", "second_", "third_"};
    int K = in[0].shape(-1);
    size_t size = 0, width = 0;
    for (const auto& a : out) {
      size += a.size();
      width += a.shape(-1);
    }
    int M = int(size / width);
    if (M > max_launch_rows || !has_short_rows(in[0])) {
      return {};
    }
    auto dtype = in[0].dtype();
    Tile tile = quantized_tile(M, width, dtype, bits);
    auto launch =
        quantized_launch(op, M, 0, K, tile, dtype, dtype, group_size, bits);
    launch.constants[4] = out.size() == 3;
    bool whole = K % 256 == 0;
    launch.buffers = {Buffer::array(Role::in, "x", {M, K}, dtype, 16)};
    add_scalars(launch, {{"M", M}, {"K", K}});
    for (size_t i = 0; i < out.size(); ++i) {
      std::string name = names[i];
      int N = out[i].shape(-1);
      // The tiles of each matrix, side by side.
      launch.grid[0] += tile.threadgroups(N);
      whole = whole && tile.divides(N);
      add_matrix(launch, name, {N}, K, dtype, group_size, bits);
      launch.buffers.push_back(
          Buffer::array(Role::out, name + "out", {M, N}, dtype));
      launch.buffers.push_back(Buffer::scalar(name + "N", uint32_t(N)));
    }
    launch.constants[8] = whole;
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    int N = 0;
    std::vector<QuantizedMatmulArgs> matrices;
    for (size_t i = 0; i < out.size(); ++i) {
      auto args = quantized_args(&in[1 + 3 * i], in[0], group_size, bits);
      args.out = out[i].data<void>();
      args.out_storage = args.storage;
      matrices.push_back(args);
      N += args.N;
    }
    Rows rows(in[0]);
    int K = in[0].shape(-1);
    auto plan = quantized_matmul_plan(rows.count(), N, K, group_size, bits);
    return [rows = std::move(rows),
            matrices = std::move(matrices),
            plan,
            N,
            order = quantized_order(bits)] {
      run_slices(
          rows, plan, N, order, [&](auto... at) { columns(matrices, at...); });
    };
  }
};

Arrays quantized_matmuls(
    const mx::array& x, // [..., K]
    const std::vector<Arrays>& matrices, // w, scales, biases
    Integer group_size,
    Integer bits) {
  constexpr auto op = QuantizedMatmuls::op;
  check(
      matrices.size() == 2 || matrices.size() == 3,
      op,
      "matrices",
      "be 2 or 3",
      matrices.size());
  std::vector<QuantizedMatrix> quantized;
  for (size_t i = 0; i < matrices.size(); ++i) {
    std::string name = "matrices[" + std::to_string(i) + "]";
    const auto& m = matrices[i];
    check(m.size() == 3, op, name.c_str(), "have 3 arrays", m.size());
    quantized.push_back({name + " ", m[0], m[1], m[2]});
  }
  check_quantized(op, x, quantized, group_size, bits, 2, true);

  Arrays inputs = {x};
  std::vector<mx::Shape> shapes;
  for (const auto& matrix : matrices) {
    for (const auto& a : matrix) {
      inputs.push_back(made_contiguous(a));
    }
    shapes.push_back(x.shape());
    shapes.back().back() = matrix[0].shape(0);
  }
  return lazy_results(
      QuantizedMatmuls{group_size, bits},
      std::move(shapes),
      std::vector<mx::Dtype>(matrices.size(), x.dtype()),
      inputs);
}

} // namespace

void bind_quantized_matmuls(nb::module_& m) {
  m.def(
      "quantized_matmuls",
      &quantized_matmuls,
      "x"_a,
      "matrices"_a,
      "group_size"_a,
      "bits"_a);
}

} // namespace pyengine
