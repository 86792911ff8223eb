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

// Fewer multiply-adds than this, some tens of microseconds, are over before a
// second thread has helped much: a small model's steps stay on one.
constexpr int64_t work_worth_sharing = 1 << 20;

// Calls work(piece) for some pieces of it, its groups for example.
template <typename Work>
void run_pieces(const Plan& plan, int pieces, const Work& work) {
  if (plan.work < work_worth_sharing) {
    for (int piece = 0; piece < pieces; ++piece) {
      work(piece);
    }
  } else {
    Pool::shared().run(pieces, work);
  }
}

} // namespace pyengine
