#pragma once
// limits: numeric_limits.

namespace metal {

template <class T>
struct numeric_limits;

#define MSL_INTEGER_LIMITS(T, lowest_, max_, digits_)               \
  template <>                                                       \
  struct numeric_limits<T> {                                        \
    static constexpr bool is_specialized = true, is_integer = true; \
    static constexpr bool is_signed = T(-1) < T(0);                 \
    static constexpr int digits = digits_;                          \
    static constexpr T min() {                                      \
      return lowest_;                                               \
    }                                                               \
    static constexpr T lowest() {                                   \
      return lowest_;                                               \
    }                                                               \
    static constexpr T max() {                                      \
      return max_;                                                  \
    }                                                               \
    static constexpr T epsilon() {                                  \
      return 0;                                                     \
    }                                                               \
    static constexpr T infinity() {                                 \
      return 0;                                                     \
    }                                                               \
    static constexpr T quiet_NaN() {                                \
      return 0;                                                     \
    }                                                               \
  };
MSL_INTEGER_LIMITS(bool, false, true, 1)
MSL_INTEGER_LIMITS(char, -128, 127, 7)
MSL_INTEGER_LIMITS(int8_t, -128, 127, 7)
MSL_INTEGER_LIMITS(uchar, 0, 255, 8)
MSL_INTEGER_LIMITS(short, -32768, 32767, 15)
MSL_INTEGER_LIMITS(ushort, 0, 65535, 16)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX, 31)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX, 32)
MSL_INTEGER_LIMITS(long, (-9223372036854775807L - 1), 9223372036854775807L, 63)
MSL_INTEGER_LIMITS(ulong, 0, 18446744073709551615ul, 64)
#undef MSL_INTEGER_LIMITS

#define MSL_FLOAT_LIMITS(T, min_, max_, epsilon_, digits_)           \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr bool is_specialized = true, is_integer = false; \
    static constexpr bool is_signed = true;                          \
    static constexpr int digits = digits_;                           \
    static constexpr T min() {                                       \
      return (T)min_;                                                \
    }                                                                \
    static constexpr T lowest() {                                    \
      return (T)(-max_);                                             \
    }                                                                \
    static constexpr T max() {                                       \
      return (T)max_;                                                \
    }                                                                \
    static constexpr T epsilon() {                                   \
      return (T)epsilon_;                                            \
    }                                                                \
    static constexpr T infinity() {                                  \
      return (T)__builtin_inff();                                    \
    }                                                                \
    static constexpr T quiet_NaN() {                                 \
      return (T)__builtin_nanf("");                                  \
    }                                                                \
    static constexpr T signaling_NaN() {                             \
      return (T)__builtin_nanf("");                                  \
    }                                                                \
  };
MSL_FLOAT_LIMITS(float, 1.17549435e-38f, 3.40282347e+38f, 1.1920929e-07f, 24)
MSL_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.f, 9.765625e-04f, 11)
MSL_FLOAT_LIMITS(bfloat, 1.17549435e-38f, 3.38953139e+38f, 7.8125e-03f, 8)
#undef MSL_FLOAT_LIMITS

} // namespace metal
