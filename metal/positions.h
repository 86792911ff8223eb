#pragma once
// positions.h: where positions lie in a cache: one rule for the kernels of this
// folder and for csrc.
//
// An offset may be known to the device alone, so no value of it may lead out of
// a cache. Where rows are written, their slots count from 0 whatever its sign,
// and are T different ones even where offset + t is no int. Where rows are
// read, attends() decides. Functions are static, since csrc compiles them once
// for every instruction set (csrc/cpu/kernel.h).

namespace pyengine {

// Positions are from 0 to below this: far beyond any context, and so far from
// 2^31 that a kernel may look ahead by a span.
enum { max_positions = 1 << 30 };

// Positions of a page.
enum { page_size = 64 };

// Position of row t, for its angles: wraps around at 32 bits.
static inline int position_at(int offset, int t) {
  return int(unsigned(offset) + unsigned(t));
}

// Slot of a position in a ring of C.
static inline int slot_of(int position, int C) {
  int slot = position % C;
  return slot < 0 ? slot + C : slot;
}

// The same of row t, below C.
static inline int slot_of_row(int offset, int t, int C) {
  int slot = slot_of(offset, C);
  return t < C - slot ? slot + t : t - (C - slot);
}

// The first position that a row sees: `window` is at least 1.
static inline int oldest_seen(int position, int window) {
  return position < window ? 0 : position - window + 1;
}

// Whether T rows from `length` on have positions, and a table of N pages can
// name all that they see.
static inline bool attends(int length, int T, int N, int window) {
  if (length < 0 || length > max_positions - T) {
    return false;
  }
  int first = oldest_seen(length, window) / page_size;
  return (length + T - 1) / page_size - first < N;
}

} // namespace pyengine
