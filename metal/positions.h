#pragma once
// positions.h: where positions lie in memory: one rule for the kernels of this
// folder and for csrc.
//
// Positions, owners and tables may be known to the device alone, so no value of
// them may lead out of an arena: page_of() says where a row is written, and
// that there is no such page. Where rows are read, attends() decides. Functions
// are static, since csrc compiles them once for every instruction set
// (csrc/cpu/kernel.h).

namespace pyengine {

// Positions are from 0 to below this: far beyond any context, and so far from
// 2^31 that a kernel may look ahead by a span.
enum { max_positions = 1 << 30 };

// Positions of a page: a chunk of block_attention's sums.
enum { page_size = 64 };

static inline bool is_page(int page, int P) {
  return 0 <= page && page < P;
}

// Page of a position of sequence `owner`, one of P, by the tables [Q, N];
// negative where there is none. A pointer's type names its address space.
template <typename Tables>
static inline int
page_of(Tables tables, int Q, int N, int P, int owner, int position) {
  if (position < 0 || owner < 0 || owner >= Q || N == 0) {
    return -1;
  }
  int page = tables[long(owner) * N + position / page_size % N];
  return is_page(page, P) ? page : -1;
}

// The same of the position `row` behind `length`, neither of which need be one.
template <typename Tables>
static inline int page_behind(
    Tables tables,
    int Q,
    int N,
    int P,
    int owner,
    int length,
    int row) {
  bool known = 0 <= length && length < max_positions && 0 <= row &&
      row < max_positions - length;
  return known ? page_of(tables, Q, N, P, owner, length + row) : -1;
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
