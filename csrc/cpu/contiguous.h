#pragma once
// packed.h: an input as row-contiguous memory, whatever its strides.
//
// mx::contiguous would do it too, as one more node in the graph for every call;
// a forward pass has hundreds of calls and almost no strided input. So a
// contiguous input is read where it lies, and a strided one is gathered inside
// the task.

#include <cstring>
#include <memory>
#include <vector>

#include "mlx/array.h"
#include "mlx/ops.h"

namespace pyengine {

namespace mx = mlx::core;

class Packed {
 public:
  explicit Packed(const mx::array& a) : data_(a.data<char>()) {
    if (!a.flags().row_contiguous) {
      gather_ = std::make_shared<Gather>(Gather{
          {a.shape().begin(), a.shape().end()},
          {a.strides().begin(), a.strides().end()},
          a.itemsize(),
          {}});
    }
  }

  // To be called inside the task: the data of a lazy input is not there before.
  // The pointer lives as long as this object.
  const void* get() const {
    return gather_ ? gather_->run(data_) : data_;
  }

 private:
  struct Gather {
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    size_t itemsize;
    std::vector<char> packed;

    const char* run(const char* from) {
      size_t bytes = itemsize;
      for (int64_t extent : shape) {
        bytes *= size_t(extent);
      }
      packed.resize(bytes);
      char* to = packed.data();
      if (bytes > 0) {
        copy(0, from, to);
      }
      return packed.data();
    }

    void copy(size_t axis, const char* from, char*& to) {
      if (axis == shape.size()) {
        std::memcpy(to, from, itemsize);
        to += itemsize;
        return;
      }
      bool last = axis + 1 == shape.size();
      if (last && strides[axis] == 1) {
        std::memcpy(to, from, size_t(shape[axis]) * itemsize);
        to += size_t(shape[axis]) * itemsize;
        return;
      }
      for (int64_t i = 0; i < shape[axis]; ++i) {
        copy(axis + 1, from + i * strides[axis] * int64_t(itemsize), to);
      }
    }
  };

  const char* data_;
  std::shared_ptr<Gather> gather_; // a task must be copyable
};

// The same for a Metal kernel, which reads an input where it lies: there the
// graph does get the node, unless the input is known to be contiguous.
inline mx::array packed_on_gpu(const mx::array& a, mx::Stream stream) {
  if (stream.device == mx::Device::cpu ||
      (a.is_available() && a.flags().row_contiguous)) {
    return a;
  }
  return mx::contiguous(a, false, stream);
}

} // namespace pyengine
