#pragma once
// vector: constructors, casts and packed vectors.
//
// C++ cannot write float4(a, b, c, d) for clang's vector types; the rewriter
// turns it into msl_make<float4>(a, b, c, d).

namespace metal {

template <class T>
struct msl_vector {
  using element = T;
  static constexpr int length = 1;
  static constexpr bool is_vector = false;
};
template <class T, int N>
struct msl_vector<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int length = N;
  static constexpr bool is_vector = true;
};
template <class T>
using msl_element = typename msl_vector<T>::element;

// static_cast, and the step that clang refuses: between half and bfloat.
template <class To, class From>
MSL_INLINE constexpr To msl_cast(From x) {
  constexpr bool by_float = (is_same_v<To, bfloat> && is_same_v<From, half>) ||
      (is_same_v<To, half> && is_same_v<From, bfloat>);
  if constexpr (by_float) {
    return (To)(float)x;
  } else {
    return static_cast<To>(x);
  }
}

template <class V, class A>
MSL_INLINE void msl_append(V& result, int& i, A a) {
  if constexpr (msl_vector<A>::is_vector) {
    for (int k = 0; k < msl_vector<A>::length; ++k) {
      result[i++] = msl_cast<msl_element<V>>(a[k]);
    }
  } else {
    result[i++] = msl_cast<msl_element<V>>(a);
  }
}

template <class V, class... A>
MSL_INLINE V msl_make(A... a) {
  if constexpr (!msl_vector<V>::is_vector) {
    return V(a...);
  } else if constexpr (sizeof...(A) == 0) {
    return V{};
  } else if constexpr (
      sizeof...(A) == 1 && !(msl_vector<A>::is_vector && ...)) {
    V result;
    for (int i = 0; i < msl_vector<V>::length;) {
      (msl_append(result, i, a), ...);
    }
    return result;
  } else {
    static_assert(
        (msl_vector<A>::length + ...) == msl_vector<V>::length,
        "vector constructor with the wrong number of elements");
    V result;
    int i = 0;
    (msl_append(result, i, a), ...);
    return result;
  }
}

// (float4)x becomes msl_to<float4>() ->* x.
template <class V>
struct msl_to {};
template <class V, class A>
MSL_INLINE V operator->*(msl_to<V>, A a) {
  return msl_make<V>(a);
}

template <class To, class From>
MSL_INLINE To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type between different sizes");
  return __builtin_bit_cast(To, x);
}

// packed_float3 and its like: twelve bytes, not sixteen. The compiler would
// read them as three numbers, a GPU reads them at once; so the checks are told.
template <class T, class From>
MSL_INLINE T msl_read_packed(From from) {
#ifdef WORKBENCH_CHECKED
  workbench_read((const void*)(uintptr_t)from, sizeof(T));
  return msl_peek((const T*)(uintptr_t)from);
#else
  return *(const T*)from;
#endif
}
template <class T>
struct msl_packed3 {
  T x, y, z;
  msl_packed3() = default;
  MSL_INLINE msl_packed3(vec<T, 3> v) : x(v[0]), y(v[1]), z(v[2]) {}
  MSL_INLINE msl_packed3(const device msl_packed3& other)
      : msl_packed3(msl_read_packed<msl_packed3>(&other)) {}
  MSL_INLINE msl_packed3(const threadgroup msl_packed3& other)
      : msl_packed3(msl_read_packed<msl_packed3>(&other)) {}
  MSL_INLINE msl_packed3(constant msl_packed3& other)
      : msl_packed3(msl_read_packed<msl_packed3>(&other)) {}
  MSL_INLINE operator vec<T, 3>() const {
    vec<T, 3> v = {x, y, z};
    return v;
  }
  MSL_INLINE T operator[](int i) const {
    return i == 0 ? x : i == 1 ? y : z;
  }
};
template <class T>
struct msl_vector<msl_packed3<T>> {
  using element = T;
  static constexpr int length = 3;
  static constexpr bool is_vector = true;
};

template <class T, int Columns, int Rows>
struct matrix {
  vec<T, Rows> columns[Columns];
  MSL_INLINE vec<T, Rows>& operator[](int i) {
    return columns[i];
  }
  MSL_INLINE const vec<T, Rows>& operator[](int i) const {
    return columns[i];
  }
};

template <class T, size_t N>
struct array {
  T elements[N];
  MSL_INLINE constexpr T& operator[](size_t i) {
    return elements[i];
  }
  MSL_INLINE constexpr const T& operator[](size_t i) const {
    return elements[i];
  }
  static constexpr size_t size() {
    return N;
  }
};

template <class T>
using uniform = T;
template <class T>
MSL_INLINE constexpr T make_uniform(T x) {
  return x;
}

// Whole objects copied between address spaces, which C++ has no words for: the
// rewriter turns *(device V*)p into these where V may be a class.
#define MSL_COPIES(space)                          \
  template <class T>                               \
  MSL_INLINE T msl_load(const space T* p) {        \
    return *(const T*)p;                           \
  }                                                \
  template <class T, class V>                      \
  MSL_INLINE void msl_store(space T* p, V value) { \
    *(T*)p = value;                                \
  }
MSL_COPIES(device)
MSL_COPIES(threadgroup)
MSL_COPIES(thread)
#undef MSL_COPIES
template <class T>
MSL_INLINE T msl_load(constant T* p) {
  return *(const T*)(uintptr_t)p;
}

} // namespace metal

using metal::as_type;
using metal::msl_cast;
using metal::msl_load;
using metal::msl_make;
using metal::msl_store;
typedef metal::matrix<float, 2, 2> float2x2;
typedef metal::matrix<float, 3, 3> float3x3;
typedef metal::matrix<float, 4, 4> float4x4;
typedef metal::matrix<half, 4, 4> half4x4;
typedef metal::msl_packed3<char> packed_char3;
typedef metal::msl_packed3<uchar> packed_uchar3;
typedef metal::msl_packed3<short> packed_short3;
typedef metal::msl_packed3<ushort> packed_ushort3;
typedef metal::msl_packed3<int> packed_int3;
typedef metal::msl_packed3<uint> packed_uint3;
typedef metal::msl_packed3<float> packed_float3;
typedef metal::msl_packed3<half> packed_half3;
typedef metal::msl_packed3<bfloat> packed_bfloat3;
