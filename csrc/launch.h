#pragma once
// launch.h: how one kernel is started, as data.
//
// X_plan() in X.cpp computes a Launch from shapes and dtypes alone; whatever
// runs the kernel runs that description. So a launch is written once, and can
// be tested without running it.

#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace pyengine {

struct Launch {
  // Slices of at most max_rows rows, run one after the other.
  int slices = 1;
  // Independent groups per slice. Each owns `columns` output columns, the last
  // one what is left: nothing is summed across groups.
  int groups = 1;
  int columns = 1;
  // Floats of scratch that the groups of a slice share, and of each its own.
  size_t scratch = 0;
  size_t group_scratch = 0;
  // Multiply-adds of one slice.
  int64_t work = 0;
};

// Fewer multiply-adds than this take less time than waking a thread.
constexpr int64_t work_worth_sharing = 1 << 17;

// Calls work(group) for all groups of one slice.
template <typename Work>
void run_groups(const Launch& launch, const Work& work) {
  if (launch.work < work_worth_sharing) {
    for (int group = 0; group < launch.groups; ++group) {
      work(group);
    }
  } else {
    Pool::shared().run(launch.groups, work);
  }
}

} // namespace pyengine
