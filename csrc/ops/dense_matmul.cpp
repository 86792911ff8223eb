// dense_matmul: x @ w.T for weights in a storage dtype. The arithmetic is in
// dense_matmul_cpu.cpp.

#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings.h"
#include "check.h"
#include "matmul.h"
#include "matmul_launch.h"
#include "op.h"
#include "ops/dense_matmul_cpu.h"

namespace pyengine {

namespace {

Plan dense_matmul_plan(int M, int N, int K, size_t itemsize) {
  return matmul_plan(M, N, K, K * itemsize);
}

// Inputs: x, w.
struct DenseMatmul {
  static constexpr const char* op = "dense_matmul";
  bool operator==(const DenseMatmul&) const = default;

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    int N = out[0].shape(-1), K = in[0].shape(-1);
    int M = int(out[0].size() / N);
    if (M > max_launch_rows || !has_short_rows(in[0])) {
      return {};
    }
    auto dtype = in[0].dtype(), out_dtype = out[0].dtype();
    auto kernel = std::string(op) + "_" + dtype_name(dtype);
    Tile tile = {dtype == mx::float32 ? 8 : 4, 8};
    auto launch = matmul_launch(op, kernel, M, N, K, tile);
    launch.constants[2] = out_dtype == mx::float32 && dtype != mx::float32;
    bool aligned = int64_t(K) * dtype.size() % 16 == 0;
    launch.constants[3] = aligned;
    launch.buffers = {
        Buffer::array(Role::in, "x", {M, K}, dtype, aligned ? 16 : 1),
        Buffer::array(Role::in, "w", {N, K}, dtype, aligned ? 16 : 1),
        Buffer::array(Role::out, "out", {M, N}, out_dtype)};
    add_scalars(launch, {{"M", M}, {"N", N}, {"K", K}});
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    const auto& w = in[1];
    Rows rows(in[0]);
    DenseMatmulArgs args = {};
    args.w = w.data<void>();
    args.out = out[0].data<void>();
    args.storage = storage_of(w.dtype());
    args.out_storage = storage_of(out[0].dtype());
    args.N = w.shape(0);
    args.K = w.shape(1);
    auto plan = dense_matmul_plan(rows.count(), args.N, args.K, w.itemsize());
    return [rows = std::move(rows), plan, args] {
      auto kernel = PYENGINE_PICK_KERNEL(dense_matmul_columns);
      run_matmul(rows, plan, args, Order::dense, kernel);
    };
  }
};

mx::array dense_matmul(
    const mx::array& x, // [..., K]
    const mx::array& w, // [N, K]
    std::optional<mx::Dtype> out_dtype) {
  constexpr auto op = DenseMatmul::op;
  check_storage_dtype(op, "x", x);
  check(x.ndim() >= 1, op, "x", "have at least 1 dimension", x.ndim());
  check_rows(op, "x", x);
  check_dtype(op, "w", w, x.dtype(), "have the dtype of x");
  check(w.ndim() == 2, op, "w", "have shape [N, K]", w.shape());
  check_shape(op, "w", w, {w.shape(0), x.shape(-1)});
  mx::Dtype dtype = check_out_dtype(op, x, out_dtype);
  auto shape = x.shape();
  shape.back() = w.shape(0);
  return lazy_result(
      DenseMatmul{}, std::move(shape), dtype, {x, made_contiguous(w)});
}

} // namespace

void bind_dense_matmul(nb::module_& m) {
  m.def("dense_matmul", &dense_matmul, "x"_a, "w"_a, "out_dtype"_a.none());
  m.def(
      "dense_matmul_plan",
      &dense_matmul_plan,
      "M"_a,
      "N"_a,
      "K"_a,
      "itemsize"_a);
}

} // namespace pyengine
