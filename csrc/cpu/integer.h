#pragma once
// integer.h: an integer argument of an op, of any size.
//
// An int parameter would turn 2**40 away with a TypeError about signatures,
// before the rule that it breaks could name it.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <ostream>

#include "bindings.h"

namespace pyengine {

class Integer {
 public:
  Integer(int64_t value = 0) : value_(value) {}

  // The nearest int: a rule that an integer breaks, that one breaks too.
  operator int() const {
    using Limits = std::numeric_limits<int>;
    return int(std::clamp<int64_t>(value_, Limits::min(), Limits::max()));
  }

  // The nearest int64_t.
  int64_t wide() const {
    return value_;
  }

 private:
  int64_t value_;
};

inline std::ostream& operator<<(std::ostream& out, Integer a) {
  using Limits = std::numeric_limits<int64_t>;
  return out << a.wide()
             << (a.wide() == Limits::max()       ? " or more"
                     : a.wide() == Limits::min() ? " or less"
                                                 : "");
}

} // namespace pyengine

namespace nanobind::detail {

template <>
struct type_caster<pyengine::Integer> {
  NB_TYPE_CASTER(pyengine::Integer, const_name("int"))

  bool from_python(handle src, uint8_t, cleanup_list*) noexcept {
    object index = steal(PyNumber_Index(src.ptr()));
    if (!index.is_valid()) {
      PyErr_Clear();
      return false;
    }
    int beyond = 0;
    int64_t number = PyLong_AsLongLongAndOverflow(index.ptr(), &beyond);
    using Limits = std::numeric_limits<int64_t>;
    value = pyengine::Integer(
        beyond > 0       ? Limits::max()
            : beyond < 0 ? Limits::min()
                         : number);
    return true;
  }
};

} // namespace nanobind::detail
