// write_cache: checks, primitive and, since it only moves bytes, the copy.

#include "ops/write_cache.h"

#include <cstring>
#include <memory>

#include "bindings.h"
#include "check.h"
#include "cpu/packed.h"
#include "mlx/backend/cpu/encoder.h"

namespace pyengine {

namespace {

constexpr const char* op = "write_cache";

void share_cache(const mx::array& cache, mx::array& out) {
  if (cache.size() > 0 && !cache.flags().row_contiguous) {
    throw std::runtime_error(
        "[write_cache] cache must be contiguous but got a strided view; "
        "allocate it with mx.zeros and keep only what write_cache returns.");
  }
  out.copy_shared_buffer(cache);
}

} // namespace

Launch write_cache_launch(int B, int T, int K, int C, int D, mx::Dtype dtype) {
  using Role = Buffer::Role;
  constexpr int threads = 256;
  int64_t size = int64_t(B) * T * K * D;
  bool wide = mx::size_of(dtype) == 4;
  Launch launch;
  launch.library = op;
  launch.kernel = std::string(op) + (wide ? "_uint32" : "_uint16");
  launch.grid = {int((size + threads - 1) / threads), 1, 1};
  launch.threadgroup = {threads, 1, 1};
  launch.buffers = {
      Buffer::array(Role::in, "new", {B, T, K, D}, dtype),
      Buffer::array(Role::in, "offset", {}, mx::int32),
      Buffer::array(Role::inout, "cache", {B, K, C, D}, dtype),
      Buffer::scalar("size", uint32_t(size)),
      Buffer::scalar("T", uint32_t(T)),
      Buffer::scalar("K", uint32_t(K)),
      Buffer::scalar("C", uint32_t(C)),
      Buffer::scalar("D", uint32_t(D))};
  return launch;
}

mx::array write_cache(
    const mx::array& cache,
    const mx::array& new_rows,
    const mx::array& offset) {
  check_storage_dtype(op, "cache", cache);
  check(
      cache.ndim() == 4, op, "cache", "have shape [B, K, C, D]", cache.shape());
  check(
      new_rows.ndim() == 4,
      op,
      "new",
      "have shape [B, T, K, D]",
      new_rows.shape());
  int T = new_rows.shape(1);
  int C = cache.shape(2);
  check_shape(
      op, "new", new_rows, {cache.shape(0), T, cache.shape(1), cache.shape(3)});
  check_dtype(op, "new", new_rows, cache.dtype(), "have the dtype of cache");
  if (T > C) {
    fail(op, "T", "be at most the capacity " + std::to_string(C), T);
  }
  check_offset(op, offset, T);
  auto stream = mx::to_stream({});
  return mx::array(
      cache.shape(),
      cache.dtype(),
      std::make_shared<WriteCache>(stream),
      {cache, packed_on_gpu(new_rows, stream), offset});
}

void WriteCache::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& cache = inputs[0];
  const auto& new_rows = inputs[1];
  auto& out = outputs[0];
  share_cache(cache, out);
  if (new_rows.size() == 0) {
    return;
  }

  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(out);
  encoder.dispatch([packed = Packed(new_rows),
                    offset = inputs[2].data<int32_t>(),
                    to = out.data<char>(),
                    B = cache.shape(0),
                    T = new_rows.shape(1),
                    K = cache.shape(1),
                    C = cache.shape(2),
                    row = size_t(cache.shape(3)) * cache.itemsize()] {
    auto* from = static_cast<const char*>(packed.get());
    for (int b = 0; b < B; ++b) {
      for (int t = 0; t < T; ++t) {
        int slot = slot_of_row(*offset, t, C);
        for (int head = 0; head < K; ++head, from += row) {
          std::memcpy(
              to + ((int64_t(b) * K + head) * C + slot) * row, from, row);
        }
      }
    }
  });
}

void WriteCache::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto& cache = inputs[0];
  const auto& new_rows = inputs[1];
  share_cache(cache, outputs[0]);
  if (new_rows.size() == 0) {
    return;
  }
  check_launch_size(op, new_rows.size());
  auto launch = write_cache_launch(
      cache.shape(0),
      new_rows.shape(1),
      cache.shape(1),
      cache.shape(2),
      cache.shape(3),
      cache.dtype());
  run_on_gpu(launch, stream(), {new_rows, inputs[2]}, outputs);
}

void bind_write_cache(nb::module_& m) {
  m.def(
      "write_cache",
      &write_cache,
      nb::arg("cache"),
      nb::arg("new"),
      nb::arg("offset"));
  m.def(
      "write_cache_launch",
      &write_cache_launch,
      nb::arg("B"),
      nb::arg("T"),
      nb::arg("K"),
      nb::arg("C"),
      nb::arg("D"),
      nb::arg("dtype"));
}

} // namespace pyengine
