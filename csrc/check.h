#pragma once
// check.h: argument errors, all of the form `[op] what must rule but got
// value.`
//
// They leave as std::invalid_argument, which Python sees as ValueError, while
// the op is being called: nothing is deferred to evaluation.

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../metal/positions.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace pyengine {

namespace mx = mlx::core;

inline std::string written(const mx::Shape& shape) {
  std::string text = "[";
  for (int extent : shape) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  }
  return text + "]";
}

template <typename Rule, typename Got>
[[noreturn]] void
fail(const char* op, const char* what, const Rule& rule, const Got& got) {
  std::ostringstream text;
  text << "[" << op << "] " << what << " must " << rule << " but got ";
  if constexpr (std::is_same_v<Got, mx::Shape>) {
    text << written(got);
  } else {
    text << got;
  }
  text << ".";
  throw std::invalid_argument(text.str());
}

// Rules that name a shape or a dtype are built where they fail, with `fail`.
template <typename Got>
void check(
    bool holds,
    const char* op,
    const char* what,
    const char* rule,
    const Got& got) {
  if (!holds) [[unlikely]] {
    fail(op, what, rule, got);
  }
}

inline bool is_storage_dtype(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

inline void
check_storage_dtype(const char* op, const char* what, const mx::array& a) {
  check(
      is_storage_dtype(a.dtype()),
      op,
      what,
      "be float32, float16 or bfloat16",
      a.dtype());
}

inline void check_dtype(
    const char* op,
    const char* what,
    const mx::array& a,
    mx::Dtype dtype,
    const char* rule) {
  check(a.dtype() == dtype, op, what, rule, a.dtype());
}

inline void check_shape(
    const char* op,
    const char* what,
    const mx::array& a,
    const mx::Shape& shape) {
  if (a.shape() != shape) [[unlikely]] {
    fail(op, what, "have shape " + written(shape), a.shape());
  }
}

// An array of this dtype and shape.
inline void check_array(
    const char* op,
    const char* what,
    const mx::array& a,
    mx::Dtype dtype,
    const mx::Shape& shape) {
  if (a.dtype() != dtype) [[unlikely]] {
    std::ostringstream rule;
    rule << "be " << dtype;
    fail(op, what, rule.str(), a.dtype());
  }
  check_shape(op, what, a, shape);
}

// Keys or values of many sequences.
inline void check_arena(const char* op, const char* what, const mx::array& a) {
  if (a.ndim() != 4 || a.shape(2) != page_size) [[unlikely]] {
    fail(op, what, "have shape [P, K, 64, D]", a.shape());
  }
}

// Leading dimensions multiply to an int, though one of the others may be 0.
inline void check_rows(const char* op, const char* what, const mx::array& a) {
  int64_t rows = 1;
  for (int axis = 0; axis + 1 < int(a.ndim()); ++axis) {
    rows *= a.shape(axis);
    check(rows <= INT32_MAX, op, what, "have fewer than 2**31 rows", a.shape());
  }
}

} // namespace pyengine
