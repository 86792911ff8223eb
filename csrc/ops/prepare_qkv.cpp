// prepare_qkv: checks and primitive; the arithmetic is in prepare_qkv_cpu.cpp.

#include "ops/prepare_qkv.h"

#include <nanobind/stl/vector.h>

#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "mlx/backend/cpu/encoder.h"
#include "norm_launch.h"
#include "ops/norm_rope_cpu.h"
#include "ops/prepare_qkv_cpu.h"

namespace pyengine {

namespace {

constexpr const char* op = "prepare_qkv";

// The caches stay where they are, whoever else holds them (write_cache.h).
void share_caches(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  for (int i : {6, 7}) {
    if (inputs[i].size() > 0 && !inputs[i].flags().row_contiguous) {
      throw std::runtime_error(
          "[prepare_qkv] keys and values must be contiguous but got a strided "
          "view; allocate them with mx.zeros and keep only what prepare_qkv "
          "returns.");
    }
    outputs[i - 5].copy_shared_buffer(inputs[i]);
  }
}

} // namespace

Launch prepare_qkv_launch(
    int T,
    int H,
    int K,
    int C,
    int D,
    mx::Dtype dtype,
    float eps) {
  using Role = Buffer::Role;
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
  return launch;
}

std::vector<mx::array> prepare_qkv(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& q_norm,
    const mx::array& k_norm,
    const mx::array& inv_freq,
    const mx::array& keys,
    const mx::array& values,
    const mx::array& offset,
    float eps) {
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
  if (T > C) {
    fail(op, "T", "be at most the capacity " + std::to_string(C), T);
  }
  check_offset(op, offset, T);
  check(eps > 0, op, "eps", "be positive", eps);
  auto stream = mx::to_stream({});
  return mx::array::make_arrays(
      {{1, T, q.shape(1) / D, D}, keys.shape(), values.shape()},
      {q.dtype(), q.dtype(), q.dtype()},
      std::make_shared<PrepareQkv>(stream, eps),
      {packed_on_gpu(q, stream),
       packed_on_gpu(k, stream),
       packed_on_gpu(v, stream),
       packed_on_gpu(q_norm, stream),
       packed_on_gpu(k_norm, stream),
       packed_on_gpu(inv_freq, stream),
       keys,
       values,
       offset});
}

void PrepareQkv::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  share_caches(inputs, outputs);
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (inputs[0].shape(0) == 0) {
    return;
  }

  PrepareQkvArgs args;
  args.out = out.data<void>();
  args.keys = outputs[1].data<void>();
  args.values = outputs[2].data<void>();
  args.storage = storage_of(out.dtype());
  args.T = out.shape(1);
  args.H = out.shape(2);
  args.D = out.shape(3);
  args.K = outputs[1].shape(1);
  args.C = outputs[1].shape(2);
  args.eps = eps_;

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& output : outputs) {
    encoder.set_output_array(output);
  }
  encoder.dispatch([q = Packed(inputs[0]),
                    k = Packed(inputs[1]),
                    v = Packed(inputs[2]),
                    q_weight = Packed(inputs[3]),
                    k_weight = Packed(inputs[4]),
                    inv_freq = Packed(inputs[5]),
                    offset = inputs[8].data<int32_t>(),
                    args]() mutable {
    args.q = q.get();
    args.k = k.get();
    args.v = v.get();
    args.q_weight = q_weight.get();
    args.k_weight = k_weight.get();
    args.inv_freq = static_cast<const float*>(inv_freq.get());
    args.offset = *offset;
    split_rows(
        args.T,
        (args.H + 2 * int64_t(args.K)) * args.D,
        [&](int64_t begin, int64_t end) {
          PYENGINE_PICK_KERNEL(prepare_qkv_rows)(args, begin, end);
        });
  });
}

void PrepareQkv::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  share_caches(inputs, outputs);
  auto& out = outputs[0];
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0 && outputs[1].size() == 0) {
    return;
  }
  auto launch = prepare_qkv_launch(
      out.shape(1),
      out.shape(2),
      outputs[1].shape(1),
      outputs[1].shape(2),
      out.shape(3),
      out.dtype(),
      eps_);
  std::vector<mx::array> read(inputs.begin(), inputs.begin() + 6);
  read.push_back(inputs[8]);
  run_on_gpu(launch, stream(), read, outputs);
}

void bind_prepare_qkv(nb::module_& m) {
  m.def(
      "prepare_qkv",
      &prepare_qkv,
      nb::arg("q"),
      nb::arg("k"),
      nb::arg("v"),
      nb::arg("q_norm"),
      nb::arg("k_norm"),
      nb::arg("inv_freq"),
      nb::arg("keys"),
      nb::arg("values"),
      nb::arg("offset"),
      nb::arg("eps"));
  m.def(
      "prepare_qkv_launch",
      &prepare_qkv_launch,
      nb::arg("T"),
      nb::arg("H"),
      nb::arg("K"),
      nb::arg("C"),
      nb::arg("D"),
      nb::arg("dtype"),
      nb::arg("eps"));
}

} // namespace pyengine
