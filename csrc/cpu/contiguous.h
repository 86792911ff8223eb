#pragma once
// contiguous.h: an input as row-contiguous memory, whatever its strides.
//
// mx::contiguous would do it too, as one more node in the graph for every call;
// a forward pass has hundreds of calls and almost no strided input. So a
// contiguous input is read where it lies, and a strided one is gathered inside
// the task; on a GPU it is copied when the op is encoded (encode.h).

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/device.h"
#include "mlx/ops.h"

namespace pyengine {

namespace mx = mlx::core;

class Contiguous {
 public:
  explicit Contiguous(const mx::array& a) : data_(a.data<char>()) {
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
  template <typename T = void>
  const T* get() const {
    const void* data = gather_ ? gather_->run(data_) : data_;
    return static_cast<const T*>(data);
  }

 private:
  struct Gather {
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    size_t itemsize;
    std::vector<char> gathered;

    const char* run(const char* from) {
      size_t bytes = itemsize;
      for (int64_t extent : shape) {
        bytes *= size_t(extent);
      }
      gathered.resize(bytes);
      char* to = gathered.data();
      if (bytes > 0) {
        copy(0, from, to);
      }
      return gathered.data();
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

// The same as an array, for what processor kernels read where it lies: the
// graph gets the node unless the input is known to be contiguous, as weights
// are that nobody sliced.
inline mx::array made_contiguous(const mx::array& a) {
  bool known = a.is_available() && a.flags().row_contiguous;
  return known ? a : mx::contiguous(a);
}

// An arena stays where it is, whoever else holds it: the output takes its
// buffer. MLX donates one only when nothing queued reads it, so with donation
// every write after a read would copy the arena.
inline void share_arena(
    const std::string& op,
    const std::string& what,
    const mx::array& arena,
    mx::array& out) {
  if (arena.size() > 0 && !arena.flags().row_contiguous) {
    throw std::runtime_error(
        "[" + op + "] " + what +
        " must be contiguous but got a strided view; allocate with mx.zeros "
        "and keep only what " +
        op + " returns.");
  }
  out.copy_shared_buffer(arena);
}

} // namespace pyengine
