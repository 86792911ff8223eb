#pragma once
// math: float functions. half and bfloat are computed in float and rounded
// once; vectors element by element. The C library's functions stand for
// Metal's, so the last bits of exp, sin and the like differ from a GPU's.

namespace metal {

#define MSL_FUNCTION1(name, expression)                       \
  MSL_INLINE float name(float x) {                            \
    return expression;                                        \
  }                                                           \
  MSL_INLINE half name(half h) {                              \
    float x = (float)h;                                       \
    return (half)(expression);                                \
  }                                                           \
  MSL_INLINE bfloat name(bfloat h) {                          \
    float x = (float)h;                                       \
    return (bfloat)(expression);                              \
  }                                                           \
  template <class T, int N>                                   \
  MSL_INLINE vec<T, N> name(vec<T, N> v) {                    \
    vec<T, N> result;                                         \
    for (int i = 0; i < N; ++i) {                             \
      result[i] = name(v[i]);                                 \
    }                                                         \
    return result;                                            \
  }                                                           \
  template <class T>                                          \
  MSL_INLINE enable_if_t<is_integral_v<T>, float> name(T x) { \
    return name((float)x);                                    \
  }

#define MSL_FUNCTION2(name, expression)                 \
  MSL_INLINE float name(float x, float y) {             \
    return expression;                                  \
  }                                                     \
  MSL_INLINE half name(half a, half b) {                \
    float x = (float)a, y = (float)b;                   \
    return (half)(expression);                          \
  }                                                     \
  MSL_INLINE bfloat name(bfloat a, bfloat b) {          \
    float x = (float)a, y = (float)b;                   \
    return (bfloat)(expression);                        \
  }                                                     \
  template <class T, int N>                             \
  MSL_INLINE vec<T, N> name(vec<T, N> a, vec<T, N> b) { \
    vec<T, N> result;                                   \
    for (int i = 0; i < N; ++i) {                       \
      result[i] = name(a[i], b[i]);                     \
    }                                                   \
    return result;                                      \
  }

#define MSL_MATH                                                         \
  MSL_FUNCTION1(exp, __builtin_expf(x))                                  \
  MSL_FUNCTION1(exp2, __builtin_exp2f(x))                                \
  MSL_FUNCTION1(exp10, __builtin_powf(10.f, x))                          \
  MSL_FUNCTION1(log, __builtin_logf(x))                                  \
  MSL_FUNCTION1(log2, __builtin_log2f(x))                                \
  MSL_FUNCTION1(log10, __builtin_log10f(x))                              \
  MSL_FUNCTION1(sqrt, __builtin_sqrtf(x))                                \
  MSL_FUNCTION1(rsqrt, 1.0f / __builtin_sqrtf(x))                        \
  MSL_FUNCTION1(sin, __builtin_sinf(x))                                  \
  MSL_FUNCTION1(cos, __builtin_cosf(x))                                  \
  MSL_FUNCTION1(tan, __builtin_tanf(x))                                  \
  MSL_FUNCTION1(asin, __builtin_asinf(x))                                \
  MSL_FUNCTION1(acos, __builtin_acosf(x))                                \
  MSL_FUNCTION1(atan, __builtin_atanf(x))                                \
  MSL_FUNCTION1(sinh, __builtin_sinhf(x))                                \
  MSL_FUNCTION1(cosh, __builtin_coshf(x))                                \
  MSL_FUNCTION1(tanh, __builtin_tanhf(x))                                \
  MSL_FUNCTION1(asinh, __builtin_asinhf(x))                              \
  MSL_FUNCTION1(acosh, __builtin_acoshf(x))                              \
  MSL_FUNCTION1(atanh, __builtin_atanhf(x))                              \
  MSL_FUNCTION1(sinpi, __builtin_sinf(x* M_PI_F))                        \
  MSL_FUNCTION1(cospi, __builtin_cosf(x* M_PI_F))                        \
  MSL_FUNCTION1(floor, __builtin_floorf(x))                              \
  MSL_FUNCTION1(ceil, __builtin_ceilf(x))                                \
  MSL_FUNCTION1(trunc, __builtin_truncf(x))                              \
  MSL_FUNCTION1(round, __builtin_roundf(x))                              \
  MSL_FUNCTION1(rint, __builtin_rintf(x))                                \
  MSL_FUNCTION1(fract, x - __builtin_floorf(x))                          \
  MSL_FUNCTION1(fabs, __builtin_fabsf(x))                                \
  MSL_FUNCTION1(sign, x > 0.f ? 1.f : x < 0.f ? -1.f : 0.f)              \
  MSL_FUNCTION1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.f), 1.f)) \
  MSL_FUNCTION2(pow, __builtin_powf(x, y))                               \
  MSL_FUNCTION2(powr, __builtin_powf(x, y))                              \
  MSL_FUNCTION2(atan2, __builtin_atan2f(x, y))                           \
  MSL_FUNCTION2(fmod, __builtin_fmodf(x, y))                             \
  MSL_FUNCTION2(fmin, __builtin_fminf(x, y))                             \
  MSL_FUNCTION2(fmax, __builtin_fmaxf(x, y))                             \
  MSL_FUNCTION2(copysign, __builtin_copysignf(x, y))                     \
  MSL_FUNCTION2(step, y < x ? 0.f : 1.f)                                 \
  MSL_FUNCTION2(divide, x / y)                                           \
  MSL_INLINE float fma(float a, float b, float c) {                      \
    return __builtin_fmaf(a, b, c);                                      \
  }                                                                      \
  MSL_INLINE half fma(half a, half b, half c) {                          \
    return (half)__builtin_fmaf((float)a, (float)b, (float)c);           \
  }                                                                      \
  MSL_INLINE bfloat fma(bfloat a, bfloat b, bfloat c) {                  \
    return (bfloat)__builtin_fmaf((float)a, (float)b, (float)c);         \
  }                                                                      \
  template <class T, int N>                                              \
  MSL_INLINE vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {      \
    vec<T, N> result;                                                    \
    for (int i = 0; i < N; ++i) {                                        \
      result[i] = fma(a[i], b[i], c[i]);                                 \
    }                                                                    \
    return result;                                                       \
  }                                                                      \
  MSL_INLINE float ldexp(float x, int k) {                               \
    return __builtin_ldexpf(x, k);                                       \
  }                                                                      \
  MSL_INLINE half ldexp(half x, int k) {                                 \
    return (half)__builtin_ldexpf((float)x, k);                          \
  }                                                                      \
  MSL_INLINE float frexp(float x, thread int& exponent) {                \
    return __builtin_frexpf(x, &exponent);                               \
  }                                                                      \
  MSL_INLINE int ilogb(float x) {                                        \
    return __builtin_ilogbf(x);                                          \
  }

MSL_MATH
namespace precise {
MSL_MATH
}
namespace fast {
MSL_MATH
}

#undef MSL_MATH
#undef MSL_FUNCTION1
#undef MSL_FUNCTION2

} // namespace metal
