#pragma once
// launch.h: how one Metal kernel is started, as data.
//
// An op (op.h) computes its Launches from shapes and dtypes alone. eval_gpu
// hands them to MLX's command encoder (encode.h), the workbench to the same
// kernels compiled for the processor: what is tested without a Mac is what runs
// on one. The processor kernels have a Plan of their own (plan.h).

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "mlx/mlx.h"

namespace pyengine {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// More rows than any block has: a prefill, which MLX's own kernels serve.
constexpr int max_launch_rows = 128;

struct Buffer {
  enum class Role { in, out, inout, bytes };

  std::string name;
  Role role;
  mx::Shape shape; // arrays only
  mx::Dtype dtype;
  int alignment; // bytes that its first element must lie on
  std::string data; // bytes only
  // Read here and written in place by other ops: keys and values. Never copied,
  // and an encoder is told that it is in use until the launch is done.
  bool state = false;

  static Buffer array(
      Role role,
      std::string name,
      mx::Shape shape,
      mx::Dtype dtype,
      int alignment = 1);
  static Buffer scalar(std::string name, uint32_t value);
  static Buffer scalar(std::string name, float value);
  static Buffer words(std::string name, const std::vector<uint32_t>& values);
};

using Role = Buffer::Role;

struct Launch {
  // `grid` threadgroups of `threadgroup` threads; all else is left to add.
  Launch(
      std::string library,
      std::string kernel,
      std::array<int, 3> grid,
      std::array<int, 3> threadgroup);

  std::string library; // quantized_matmul: metal/quantized_matmul.metal
  std::string kernel; // host name in that library
  std::map<int, std::variant<bool, int, float>> constants; // by index
  std::array<int, 3> grid; // threadgroups
  std::array<int, 3> threadgroup; // threads
  std::vector<Buffer> buffers; // by index, without gaps
  std::vector<std::pair<int, int>> threadgroup_memory; // index, bytes
};

// "bfloat16": the dtype's part of a host name.
std::string dtype_name(mx::Dtype dtype);

// Kernels with one thread per element count elements in 32 bits, and a grid has
// at most 2**31 threads: whether so many elements are within that.
inline bool fits_grid(size_t size) {
  return size <= INT32_MAX;
}

// A launch with one thread per element, of which there are 1 or more.
Launch elementwise_launch(std::string library, std::string kernel, size_t size);

// What launches that run in order read and write: each name once, in the order
// in which they first name it. A buffer that one writes and a later one reads,
// by its name, is a temporary and in neither list. It points into `launches`.
struct Arguments {
  std::vector<const Buffer*> read;
  std::vector<const Buffer*> written;
};

Arguments arguments_of(const std::vector<Launch>& launches);

// What is compiled for one kernel: its library's text, headers included, with
// the one instantiation.
std::string metal_source(const std::string& library, const std::string& kernel);

// Names what is compiled for a kernel: two that differ have different ones.
std::string compiled_name(
    const std::string& library,
    const std::string& kernel);

} // namespace pyengine
