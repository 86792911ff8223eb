#pragma once
// matmul.h: what quantized_matmul and dense_matmul share on the processor: rows
// of x as float32, and the loop over slices.

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/contiguous.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/rows_cpu.h"
#include "cpu/storage.h"
#include "mlx/mlx.h"

namespace pyengine {

inline mx::Dtype check_out_dtype(
    const char* op,
    const mx::array& x,
    std::optional<mx::Dtype> out_dtype) {
  mx::Dtype dtype = out_dtype.value_or(x.dtype());
  check(
      dtype == x.dtype() || dtype == mx::float32,
      op,
      "out_dtype",
      "be float32 or the dtype of x",
      dtype);
  return dtype;
}

// Rows that are made ready together: a group of columns comes from memory once
// for all of them. The rows stay in the second cache or near it.
constexpr int rows_together = 8 * max_rows;

// Groups of weights small enough for threads to finish together and to stay in
// a cache while the rows take turns, large enough to be worth handing out.
inline Plan matmul_plan(int M, int N, int K, int64_t row_bytes) {
  int rows = std::min(M, max_rows);
  int64_t bytes = std::clamp<int64_t>(N * row_bytes / 16, 1 << 14, 1 << 18);
  int64_t columns = bytes / std::max<int64_t>(row_bytes, 16) / 32 * 32;
  Plan plan;
  plan.slices = (M + max_rows - 1) / max_rows;
  plan.columns = int(std::max<int64_t>(columns, 32));
  plan.groups = (N + plan.columns - 1) / plan.columns;
  plan.scratch = size_t(rows) * padded_width(K);
  plan.group_scratch = size_t(rows) * plan.columns;
  plan.work = int64_t(std::min(M, rows_together)) * N * K;
  return plan;
}

// Where each row of an array [..., K] starts.
class Rows {
 public:
  explicit Rows(const mx::array& a)
      : data_(a.data<char>()),
        storage_(storage_of(a.dtype())),
        count_(1),
        width_(a.shape(-1)),
        stride_(a.strides(-1)) {
    for (int axis = 0; axis + 1 < int(a.ndim()); ++axis) {
      count_ *= a.shape(axis);
    }
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

  // Row `row` as row `m` of a slice of `rows` rows in scratch (rows_cpu.h).
  void load(int row, Order order, int rows, int m, float* x) const {
    int64_t offset = 0;
    for (size_t axis = shape_.size(); axis-- > 0;) {
      offset += row % shape_[axis] * strides_[axis];
      row /= shape_[axis];
    }
    size_t size = storage_ == Storage::float32 ? 4 : 2;
    PYENGINE_PICK_KERNEL(load_row)
    (data_ + offset * int64_t(size),
     storage_,
     stride_,
     width_,
     order,
     rows,
     m,
     x);
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

// Memory that grows to the largest size asked for, on cache lines: a vector
// register filled across two lines costs two loads.
class Scratch {
 public:
  float* floats(size_t count) {
    if (memory_.size() < count + 16) {
      memory_.resize(count + 16);
    }
    auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<float> memory_;
};

// The arguments of `count` rows from `first` on, whose staged form is x.
template <typename Args>
Args at_rows(Args args, int first, int count, const float* x) {
  size_t size = args.out_storage == Storage::float32 ? 4 : 2;
  args.x = x;
  args.M = count;
  args.out = static_cast<char*>(args.out) + first * size * args.N;
  return args;
}

// Calls work(first row, rows, x, begin, end, scratch) for all slices and all
// groups of columns [begin, end). Called on the stream's thread; scratch
// belongs to the threads and stays, so a matmul allocates nothing once its
// largest has run.
template <typename Work>
void run_slices(
    const Rows& rows,
    const Plan& plan,
    int N,
    Order order,
    const Work& work) {
  static thread_local Scratch of_slice;
  int most = std::min(plan.slices, rows_together / max_rows);
  float* staged = of_slice.floats(plan.scratch * most);
  auto& pool = Pool::shared();
  int threads = threads_for(plan.work);
  for (int from = 0; from < rows.count(); from += rows_together) {
    int slices = std::min(plan.slices - from / max_rows, most);
    auto with_slice = [&](int slice, const auto& call) {
      int first = from + slice * max_rows;
      int count = std::min(rows.count() - first, max_rows);
      call(first, count, staged + slice * plan.scratch);
    };
    auto load = [&](int slice) {
      with_slice(slice, [&](int first, int count, float* x) {
        for (int row = 0; row < count; ++row) {
          rows.load(first + row, order, count, row, x);
        }
      });
    };
    auto multiply = [&](int group) {
      static thread_local Scratch of_group;
      int begin = group * plan.columns;
      int end = std::min(begin + plan.columns, N);
      float* scratch = of_group.floats(plan.group_scratch);
      for (int slice = 0; slice < slices; ++slice) {
        with_slice(slice, [&](int first, int count, const float* x) {
          work(first, count, x, begin, end, scratch);
        });
      }
    };
    pool.run(slices, load, threads);
    pool.run(plan.groups, multiply, threads);
  }
}

// Runs a kernel over all slices.
template <typename Args>
void run_matmul(
    const Rows& rows,
    const Plan& plan,
    const Args& args,
    Order order,
    void kernel(const Args&, int begin, int end, float* scratch)) {
  run_slices(
      rows,
      plan,
      args.N,
      order,
      [&](int first, int count, const float* x, auto... columns) {
        kernel(at_rows(args, first, count, x), columns...);
      });
}

} // namespace pyengine
