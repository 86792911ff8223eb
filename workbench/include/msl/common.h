#pragma once
// common: min, max, clamp, select and the questions about floats, for every
// type.

namespace metal {

template <class T>
MSL_INLINE bool msl_is_nan(T x) {
  if constexpr (is_floating_point_v<T>) {
    return __builtin_isnan((float)x);
  } else {
    return false;
  }
}

// Like fmin and fmax, these return the operand that is not NaN.
#define MSL_EXTREME(name, expression)                                    \
  template <class T>                                                     \
  MSL_INLINE enable_if_t<is_arithmetic_v<T>, T> name(T a, T b) {         \
    return msl_is_nan(a) ? b : msl_is_nan(b) ? a : (expression) ? b : a; \
  }                                                                      \
  template <class T, class U>                                            \
  MSL_INLINE enable_if_t<                                                \
      is_arithmetic_v<T> && is_arithmetic_v<U> && !is_same_v<T, U>,      \
      decltype(T() + U())>                                               \
  name(T x, U y) {                                                       \
    using C = decltype(T() + U());                                       \
    return name<C>((C)x, (C)y);                                          \
  }                                                                      \
  template <class T, int N>                                              \
  MSL_INLINE vec<T, N> name(vec<T, N> a, vec<T, N> b) {                  \
    vec<T, N> result;                                                    \
    for (int i = 0; i < N; ++i) {                                        \
      result[i] = name(a[i], b[i]);                                      \
    }                                                                    \
    return result;                                                       \
  }                                                                      \
  template <class T, int N>                                              \
  MSL_INLINE vec<T, N> name(vec<T, N> a, T b) {                          \
    vec<T, N> result;                                                    \
    for (int i = 0; i < N; ++i) {                                        \
      result[i] = name(a[i], b);                                         \
    }                                                                    \
    return result;                                                       \
  }
MSL_EXTREME(min, b < a)
MSL_EXTREME(max, a < b)
#undef MSL_EXTREME

template <class T>
MSL_INLINE T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
template <class T>
MSL_INLINE T max3(T a, T b, T c) {
  return max(a, max(b, c));
}

template <class T>
MSL_INLINE T abs(T x) {
  if constexpr (msl_vector<T>::is_vector) {
    T result;
    for (int i = 0; i < msl_vector<T>::length; ++i) {
      result[i] = abs(x[i]);
    }
    return result;
  } else if constexpr (is_floating_point_v<T>) {
    return (T)__builtin_fabsf((float)x);
  } else {
    return x < T(0) ? T(-x) : x;
  }
}

template <class T>
MSL_INLINE enable_if_t<is_arithmetic_v<T>, T> clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T, class A, class B>
MSL_INLINE enable_if_t<
    is_arithmetic_v<T> && is_arithmetic_v<A> &&
        !(is_same_v<T, A> && is_same_v<T, B>),
    T>
clamp(T x, A low, B high) {
  return min(max(x, T(low)), T(high));
}
template <class T, int N>
MSL_INLINE vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}
template <class T, int N>
MSL_INLINE vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return min(max(x, low), high);
}

template <class T>
MSL_INLINE T mix(T a, T b, T t) {
  return a + (b - a) * t;
}

template <class T>
MSL_INLINE enable_if_t<is_arithmetic_v<T>, T> select(T a, T b, bool second) {
  return second ? b : a;
}
template <class T, int N, class C>
MSL_INLINE vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> second) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) {
    result[i] = second[i] ? b[i] : a[i];
  }
  return result;
}

#define MSL_QUESTION(name)                                     \
  template <class T>                                           \
  MSL_INLINE enable_if_t<is_arithmetic_v<T>, bool> name(T x) { \
    return __builtin_##name((float)x);                         \
  }                                                            \
  template <class T, int N>                                    \
  MSL_INLINE vec<bool, N> name(vec<T, N> x) {                  \
    vec<bool, N> result;                                       \
    for (int i = 0; i < N; ++i) {                              \
      result[i] = name(x[i]);                                  \
    }                                                          \
    return result;                                             \
  }
MSL_QUESTION(isnan)
MSL_QUESTION(isinf)
MSL_QUESTION(isfinite)
MSL_QUESTION(signbit)
#undef MSL_QUESTION

template <class V>
MSL_INLINE enable_if_t<msl_vector<V>::is_vector, bool> any(V v) {
  for (int i = 0; i < msl_vector<V>::length; ++i) {
    if (v[i]) {
      return true;
    }
  }
  return false;
}
template <class V>
MSL_INLINE enable_if_t<msl_vector<V>::is_vector, bool> all(V v) {
  for (int i = 0; i < msl_vector<V>::length; ++i) {
    if (!v[i]) {
      return false;
    }
  }
  return true;
}
MSL_INLINE bool any(bool b) {
  return b;
}
MSL_INLINE bool all(bool b) {
  return b;
}

template <class T, int N>
MSL_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}
template <class T, int N>
MSL_INLINE T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <class T, int N>
MSL_INLINE vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}

} // namespace metal
