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

// The same where position `start` lies in slot 0.
static inline int slot_from(int start, int position, int C) {
  int slot = slot_of(position, C) - slot_of(start, C);
  return slot < 0 ? slot + C : slot;
}

// Whether T rows from `offset` on have positions, and a cache of C slots can
// hold all that they see: T is at most C, `window` at least 1.
static inline bool attends(int offset, int T, int C, int window) {
  int before = offset < window - 1 ? offset : window - 1;
  return 0 <= offset && offset <= max_positions - T && before <= C - T;
}

} // namespace pyengine
