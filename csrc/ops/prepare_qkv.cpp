// prepare_qkv: head norms, rotary embedding and the write into the cache. The
// arithmetic is in prepare_qkv_cpu.cpp.

#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "norm_launch.h"
#include "op.h"
#include "ops/norm_rope_cpu.h"
#include "ops/prepare_qkv_cpu.h"

namespace pyengine {

namespace {

// Inputs: q, k, v, q_norm, k_norm, inv_freq, offset, keys, values.
struct PrepareQkv {
  static constexpr const char* op = "prepare_qkv";
  float eps;
  bool operator==(const PrepareQkv&) const = default;

  // The caches stay where they are, whoever else holds them (write_cache.cpp).
  void share(const Arrays& in, Arrays& out) const {
    for (int i : {7, 8}) {
      if (in[i].size() > 0 && !in[i].flags().row_contiguous) {
        throw std::runtime_error(
            "[prepare_qkv] keys and values must be contiguous but got a "
            "strided view; allocate them with mx.zeros and keep only what "
            "prepare_qkv returns.");
      }
      out[i - 6].copy_shared_buffer(in[i]);
    }
  }

  bool empty(const Arrays& in, const Arrays& out) const {
    return in[0].size() == 0 && in[1].size() == 0;
  }

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    auto dtype = out[0].dtype();
    int T = out[0].shape(1), H = out[0].shape(2), D = out[0].shape(3);
    int K = out[1].shape(1), C = out[1].shape(2);
    auto array = [&](Role role, const char* name, mx::Shape shape) {
      int alignment = pair_alignment(D, dtype);
      return Buffer::array(role, name, std::move(shape), dtype, alignment);
    };
    Launch launch = heads_launch(op, H + 2 * K, T, 1, D, dtype);
    launch.buffers = {
        array(Role::in, "q", {T, H * D}),
        array(Role::in, "k", {T, K * D}),
        array(Role::in, "v", {T, K * D}),
        array(Role::in, "q_norm", {D}),
        array(Role::in, "k_norm", {D}),
        Buffer::array(Role::in, "inv_freq", {D / 2}, mx::float32),
        Buffer::array(Role::in, "offset", {}, mx::int32),
        array(Role::out, "out", {1, T, H, D}),
        array(Role::inout, "keys", {1, K, C, D}),
        array(Role::inout, "values", {1, K, C, D}),
        Buffer::scalar("H", uint32_t(H)),
        Buffer::scalar("K", uint32_t(K)),
        Buffer::scalar("C", uint32_t(C)),
        Buffer::scalar("D", uint32_t(D)),
        Buffer::scalar("eps", eps)};
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    PrepareQkvArgs args = {};
    args.out = out[0].data<void>();
    args.keys = out[1].data<void>();
    args.values = out[2].data<void>();
    args.storage = storage_of(out[0].dtype());
    args.T = out[0].shape(1);
    args.H = out[0].shape(2);
    args.D = out[0].shape(3);
    args.K = out[1].shape(1);
    args.C = out[1].shape(2);
    args.eps = eps;
    return [q = Contiguous(in[0]),
            k = Contiguous(in[1]),
            v = Contiguous(in[2]),
            q_weight = Contiguous(in[3]),
            k_weight = Contiguous(in[4]),
            inv_freq = Contiguous(in[5]),
            offset = in[6].data<int32_t>(),
            args]() mutable {
      args.q = q.get();
      args.k = k.get();
      args.v = v.get();
      args.q_weight = q_weight.get();
      args.k_weight = k_weight.get();
      args.inv_freq = inv_freq.get<float>();
      args.offset = *offset;
      int64_t width = (args.H + 2 * int64_t(args.K)) * args.D;
      split_rows(args.T, width, PYENGINE_PICK_KERNEL(prepare_qkv_rows), args);
    };
  }
};

// The queries [1, T, H, D], then keys and values with T positions replaced.
Arrays prepare_qkv(
    const mx::array& q, // [T, H * D]
    const mx::array& k, // [T, K * D]
    const mx::array& v, // [T, K * D]
    const mx::array& q_norm, // [D]
    const mx::array& k_norm, // [D]
    const mx::array& inv_freq, // float32 [D / 2]
    const mx::array& keys, // [1, K, C, D]
    const mx::array& values, // [1, K, C, D]
    const mx::array& offset, // int32 []
    float eps) {
  constexpr auto op = PrepareQkv::op;
  check_storage_dtype(op, "q", q);
  check(
      keys.ndim() == 4 && keys.shape(0) == 1,
      op,
      "keys",
      "have shape [1, K, C, D]",
      keys.shape());
  int K = keys.shape(1), C = keys.shape(2), D = keys.shape(3);
  check(
      D % 2 == 0 && D > 0 && D <= rope_max_width,
      op,
      "D",
      "be even and at most 1024",
      D);
  check(
      q.ndim() == 2 && q.shape(1) % D == 0,
      op,
      "q",
      "have shape [T, H * D]",
      q.shape());
  int T = q.shape(0);
  check_shape(op, "values", values, keys.shape());
  check(
      int64_t(K) * D <= INT32_MAX,
      op,
      "K * D",
      "be below 2**31",
      int64_t(K) * D);
  check_shape(op, "k", k, {T, K * D});
  check_shape(op, "v", v, k.shape());
  check_shape(op, "q_norm", q_norm, {D});
  check_shape(op, "k_norm", k_norm, {D});
  for (auto [what, a] :
       {std::pair("k", &k),
        {"v", &v},
        {"q_norm", &q_norm},
        {"k_norm", &k_norm},
        {"keys", &keys},
        {"values", &values}}) {
    check_dtype(op, what, *a, q.dtype(), "have the dtype of q");
  }
  check_shape(op, "inv_freq", inv_freq, {D / 2});
  check_dtype(op, "inv_freq", inv_freq, mx::float32, "be float32");
  check_block(op, offset, T, C);
  check(eps > 0, op, "eps", "be positive", eps);
  auto inputs = Arrays{q, k, v, q_norm, k_norm, inv_freq};
  inputs.insert(inputs.end(), {offset, keys, values});
  return lazy_results(
      PrepareQkv{eps},
      {{1, T, q.shape(1) / D, D}, keys.shape(), values.shape()},
      {q.dtype(), q.dtype(), q.dtype()},
      inputs);
}

} // namespace

void bind_prepare_qkv(nb::module_& m) {
  m.def(
      "prepare_qkv",
      &prepare_qkv,
      "q"_a,
      "k"_a,
      "v"_a,
      "q_norm"_a,
      "k_norm"_a,
      "inv_freq"_a,
      "keys"_a,
      "values"_a,
      "offset"_a,
      "eps"_a);
}

} // namespace pyengine
