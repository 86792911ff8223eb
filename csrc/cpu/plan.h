#pragma once
// plan.h: how one processor kernel is run, as data.
//
// X_plan() in X.cpp computes a Plan from shapes and dtypes alone; whatever runs
// the kernel runs that description, so it is written once and can be tested
// without running it. A Metal kernel has a Launch (launch.h).

#include <cstddef>
#include <cstdint>

#include "cpu/pool.h"

namespace pyengine {

struct Plan {
  // Slices of at most max_rows rows.
  int slices = 1;
  // Independent groups. Each owns `columns` output columns, the last
  // one what is left: nothing is summed across groups.
  int groups = 1;
  int columns = 1;
  // Floats of scratch that the groups of a slice share, and of each its own.
  size_t scratch = 0;
  size_t group_scratch = 0;
  // Multiply-adds of the slices that run together.
  int64_t work = 0;
};

// Multiply-adds, a microsecond or two, for which a thread is worth calling.
constexpr int64_t work_worth_a_thread = 1 << 14;

// Fewer than this, some tens of microseconds, are done sooner on one thread
// than a thread comes back that the system has put aside in its middle.
constexpr int64_t work_worth_a_delay = 1 << 20;

// How many threads may share so many multiply-adds. Asked once for each kernel.
inline int threads_for(int64_t work) {
  auto& pool = Pool::shared();
  if (work < work_worth_a_delay &&
      (work < 2 * work_worth_a_thread || pool.was_late())) {
    return 1;
  }
  return int(std::min<int64_t>(pool.threads(), work / work_worth_a_thread));
}

} // namespace pyengine
