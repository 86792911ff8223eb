#pragma once
// matmul.h: what q8_matmul and dense_matmul share on the processor: rows of x
// as float32, and the loop over slices.

#include <algorithm>
#include <vector>

#include "check.h"
#include "isa.h"
#include "launch.h"
#include "rows_cpu.h"
#include "storage.h"

namespace pyengine {

// Where each row of an array [..., K] starts.
class Rows {
 public:
  explicit Rows(const mx::array& a)
      : data_(a.data<char>()),
        storage_(storage_of(a.dtype())),
        count_(a.shape(-1) ? int(a.size() / a.shape(-1)) : 0),
        width_(a.shape(-1)),
        stride_(a.strides(-1)) {
    if (a.flags().row_contiguous) {
      shape_ = {count_};
      strides_ = {width_};
      stride_ = 1;
    } else {
      shape_.assign(a.shape().begin(), a.shape().end() - 1);
      strides_.assign(a.strides().begin(), a.strides().end() - 1);
    }
  }

  int count() const {
    return count_;
  }

  // Row `row` into the scratch of a slice of `rows` rows (rows_cpu.h).
  void load(int row, Order order, int rows, float* to) const {
    int64_t offset = 0;
    for (size_t axis = shape_.size(); axis-- > 0;) {
      offset += row % shape_[axis] * strides_[axis];
      row /= shape_[axis];
    }
    size_t size = storage_ == Storage::float32 ? 4 : 2;
    PYENGINE_PICK_KERNEL(load_row)
    (data_ + offset * int64_t(size), storage_, stride_, width_, order, rows, to);
  }

 private:
  const char* data_;
  Storage storage_;
  int count_;
  int width_;
  int64_t stride_;
  std::vector<int> shape_;
  std::vector<int64_t> strides_;
};

// Runs a kernel over all slices. Called on the stream's thread, whose scratch
// outlives the call: a matmul allocates nothing once its largest has run.
template <typename Args>
void run_matmul(
    const Rows& rows,
    const Launch& launch,
    Args args,
    Order order,
    void kernel(const Args&, int begin, int end)) {
  static thread_local std::vector<float> scratch;
  if (scratch.size() < launch.scratch) {
    scratch.resize(launch.scratch);
  }
  size_t row_bytes =
      size_t(args.N) * (args.out_storage == Storage::float32 ? 4 : 2);
  char* out = static_cast<char*>(args.out);
  for (int slice = 0; slice < launch.slices; ++slice) {
    int first = slice * max_rows;
    args.M = std::min(rows.count() - first, max_rows);
    args.x = scratch.data();
    args.out = out + size_t(first) * row_bytes;
    for (int row = 0; row < args.M; ++row) {
      rows.load(first + row, order, args.M, scratch.data() + 16 * row);
    }
    run_groups(launch, [&](int group) {
      int begin = group * launch.columns;
      kernel(args, begin, std::min(begin + launch.columns, args.N));
    });
  }
}

} // namespace pyengine
