// prepare_qkv: head norms, rotary embedding and the write into pages. The
// arithmetic is in prepare_qkv_cpu.cpp.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>

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

// Inputs: q, k, v, q_norm, k_norm, inv_freq, positions, owners, tables, keys,
// values; and slots where they are not the positions.
struct PrepareQkv {
  static constexpr const char* op = "prepare_qkv";
  float eps;
  bool norm_values;
  bool operator==(const PrepareQkv&) const = default;

  void share(const Arrays& in, Arrays& out) const {
    for (int i : {9, 10}) {
      share_arena(op, "keys and values", in[i], out[i - 8]);
    }
  }

  bool empty(const Arrays& in, const Arrays& out) const {
    return in[0].size() == 0 && in[1].size() == 0;
  }

  std::vector<Launch> launches(const Arrays& in, const Arrays& out) const {
    auto dtype = out[0].dtype();
    int R = out[0].shape(0), H = out[0].shape(1), D = out[0].shape(2);
    int P = out[1].shape(0), K = out[1].shape(1);
    int Q = in[8].shape(0), N = in[8].shape(1);
    auto array = [&](Role role, const char* name, mx::Shape shape) {
      int alignment = pair_alignment(D, dtype);
      return Buffer::array(role, name, std::move(shape), dtype, alignment);
    };
    auto whole = [](const char* name, mx::Shape shape) {
      return Buffer::array(Role::in, name, std::move(shape), mx::int32);
    };
    Launch launch = heads_launch(op, H + 2 * K, R, D, dtype);
    bool has_slots = in.size() > 11;
    launch.constants = {{0, has_slots}};
    launch.buffers = {
        array(Role::in, "q", {R, H * D}),
        array(Role::in, "k", {R, K * D}),
        array(Role::in, "v", {R, K * D}),
        array(Role::in, "q_norm", {D}),
        array(Role::in, "k_norm", {D}),
        Buffer::array(Role::in, "inv_freq", {D / 2}, mx::float32),
        whole("positions", {R}),
        whole("owners", {R}),
        whole("tables", {Q, N}),
        array(Role::out, "out", {R, H, D}),
        array(Role::inout, "keys", out[1].shape()),
        array(Role::inout, "values", out[2].shape()),
        Buffer::scalar("H", uint32_t(H)),
        Buffer::scalar("K", uint32_t(K)),
        Buffer::scalar("D", uint32_t(D)),
        Buffer::scalar("P", uint32_t(P)),
        Buffer::scalar("Q", uint32_t(Q)),
        Buffer::scalar("N", uint32_t(N)),
        Buffer::scalar("eps", eps),
        Buffer::scalar("norm_values", uint32_t(norm_values))};
    if (has_slots) {
      launch.buffers.push_back(whole("slots", {R}));
    }
    return {launch};
  }

  auto task(const Arrays& in, Arrays& out) const {
    PrepareQkvArgs args = {};
    args.out = out[0].data<void>();
    args.keys = out[1].data<void>();
    args.values = out[2].data<void>();
    args.storage = storage_of(out[0].dtype());
    args.H = out[0].shape(1);
    args.D = out[0].shape(2);
    args.P = out[1].shape(0);
    args.K = out[1].shape(1);
    args.Q = in[8].shape(0);
    args.N = in[8].shape(1);
    args.eps = eps;
    args.norm_values = norm_values;
    return [q = Contiguous(in[0]),
            k = Contiguous(in[1]),
            v = Contiguous(in[2]),
            q_weight = Contiguous(in[3]),
            k_weight = Contiguous(in[4]),
            inv_freq = Contiguous(in[5]),
            positions = Contiguous(in[6]),
            slots = Contiguous(in.size() > 11 ? in[11] : in[6]),
            owners = Contiguous(in[7]),
            tables = Contiguous(in[8]),
            rows = out[0].shape(0),
            args]() mutable {
      args.q = q.get();
      args.k = k.get();
      args.v = v.get();
      args.q_weight = q_weight.get();
      args.k_weight = k_weight.get();
      args.inv_freq = inv_freq.get<float>();
      args.positions = positions.get<int32_t>();
      args.slots = slots.get<int32_t>();
      args.owners = owners.get<int32_t>();
      args.tables = tables.get<int32_t>();
      int64_t width = (args.H + 2 * int64_t(args.K)) * args.D;
      split_rows(rows, width, PYENGINE_PICK_KERNEL(prepare_qkv_rows), args);
    };
  }
};

// The queries [R, H, D], then keys and values with up to R places replaced.
Arrays prepare_qkv(
    const mx::array& q, // [R, H * D]
    const mx::array& k, // [R, K * D]
    const mx::array& v, // [R, K * D]
    const mx::array& q_norm, // [D]
    const mx::array& k_norm, // [D]
    const mx::array& inv_freq, // float32 [D / 2]
    const mx::array& keys, // [P, K, 64, D]
    const mx::array& values, // [P, K, 64, D]
    const mx::array& positions, // int32 [R]
    const mx::array& owners, // int32 [R]
    const mx::array& tables, // int32 [Q, N]
    float eps,
    bool norm_values,
    const std::optional<mx::array>& slots) { // int32 [R]
  constexpr auto op = PrepareQkv::op;
  check_storage_dtype(op, "q", q);
  check_arena(op, "keys", keys);
  int K = keys.shape(1), D = keys.shape(3);
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
      "have shape [R, H * D]",
      q.shape());
  int R = q.shape(0);
  check_shape(op, "values", values, keys.shape());
  check(
      int64_t(K) * D <= INT32_MAX,
      op,
      "K * D",
      "be below 2**31",
      int64_t(K) * D);
  check_shape(op, "k", k, {R, K * D});
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
  check_array(op, "positions", positions, mx::int32, {R});
  check_array(op, "owners", owners, mx::int32, {R});
  check(tables.ndim() == 2, op, "tables", "have shape [Q, N]", tables.shape());
  check_dtype(op, "tables", tables, mx::int32, "be int32");
  check(eps > 0, op, "eps", "be positive", eps);
  auto inputs = Arrays{q, k, v, q_norm, k_norm, inv_freq};
  inputs.insert(inputs.end(), {positions, owners, tables, keys, values});
  if (slots) {
    check_array(op, "slots", *slots, mx::int32, {R});
    inputs.push_back(*slots);
  }
  return lazy_results(
      PrepareQkv{eps, norm_values},
      {{R, q.shape(1) / D, D}, keys.shape(), values.shape()},
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
      "positions"_a,
      "owners"_a,
      "tables"_a,
      "eps"_a,
      "norm_values"_a,
      "slots"_a.none());
}

} // namespace pyengine
