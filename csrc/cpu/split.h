#pragma once
// split.h: threads for ops that treat every row alone.

#include <algorithm>

#include "cpu/pool.h"

namespace pyengine {

// Calls work(begin, end) until rows [0, rows) are done. Below 64 k elements a
// piece costs less than waking a thread for it, so a decode step's ops run
// where they are called, and only a prefill's are shared.
template <typename Work>
void split_rows(int64_t rows, int64_t width, const Work& work) {
  constexpr int64_t piece_elements = 1 << 16;
  int64_t step =
      std::max<int64_t>(1, piece_elements / std::max<int64_t>(1, width));
  if (rows <= step) {
    if (rows > 0) {
      work(int64_t(0), rows);
    }
    return;
  }
  Pool::shared().run(int((rows + step - 1) / step), [&](int piece) {
    int64_t begin = piece * step;
    work(begin, std::min(rows, begin + step));
  });
}

// The same for a kernel that is one call per range of rows.
template <typename Args>
void split_rows(
    int64_t rows,
    int64_t width,
    void kernel(const Args&, int64_t begin, int64_t end),
    const Args& args) {
  split_rows(rows, width, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
}

} // namespace pyengine
