#pragma once
// atomic: atomics of device and threadgroup memory. Lanes run one at a time, so
// the operations are plain; the runtime is told of each, for bounds and races.

#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_bool msl_atomic_bool
#define atomic_float msl_atomic_float
#define atomic_ulong msl_atomic_ulong

namespace metal {

template <class T>
struct atomic {
  T value;
};

#define MSL_PLAIN __attribute__((noinline)) MSL_UNCHECKED
template <class T>
MSL_PLAIN T msl_read(const volatile T* p) {
  return *p;
}
template <class T>
MSL_PLAIN T msl_exchange(volatile T* p, T value) {
  T old = *p;
  *p = value;
  return old;
}
template <class T>
MSL_PLAIN bool msl_compare_exchange(volatile T* p, T* expected, T value) {
  T old = *p;
  if (__builtin_memcmp(&old, expected, sizeof(T)) == 0) {
    *p = value;
    return true;
  }
  *expected = old;
  return false;
}
#define MSL_FETCH(name, expression)                      \
  template <class T>                                     \
  MSL_PLAIN T msl_fetch_##name(volatile T* p, T value) { \
    T old = *p;                                          \
    *p = (T)(expression);                                \
    return old;                                          \
  }
MSL_FETCH(add, old + value)
MSL_FETCH(sub, old - value)
MSL_FETCH(min, value < old ? value : old)
MSL_FETCH(max, old < value ? value : old)
MSL_FETCH(and, old& value)
MSL_FETCH(or, old | value)
MSL_FETCH(xor, old ^ value)
#undef MSL_FETCH

#define MSL_ADDRESS(p) ((volatile T*)(uintptr_t)(p))
#define MSL_FETCH_IN(space, name)                                        \
  template <class T>                                                     \
  MSL_INLINE T atomic_fetch_##name##_explicit(                           \
      volatile space atomic<T>* p, msl_element<T> value, memory_order) { \
    workbench_atomic(MSL_ADDRESS(p), sizeof(T), 1, 1);                   \
    return msl_fetch_##name<T>(MSL_ADDRESS(p), value);                   \
  }
#define MSL_ATOMICS(space)                                               \
  template <class T>                                                     \
  MSL_INLINE T atomic_load_explicit(                                     \
      const volatile space atomic<T>* p, memory_order) {                 \
    workbench_atomic(MSL_ADDRESS(p), sizeof(T), 1, 0);                   \
    return msl_read<T>(MSL_ADDRESS(p));                                  \
  }                                                                      \
  template <class T>                                                     \
  MSL_INLINE void atomic_store_explicit(                                 \
      volatile space atomic<T>* p, msl_element<T> value, memory_order) { \
    workbench_atomic(MSL_ADDRESS(p), sizeof(T), 0, 1);                   \
    msl_exchange<T>(MSL_ADDRESS(p), value);                              \
  }                                                                      \
  template <class T>                                                     \
  MSL_INLINE T atomic_exchange_explicit(                                 \
      volatile space atomic<T>* p, msl_element<T> value, memory_order) { \
    workbench_atomic(MSL_ADDRESS(p), sizeof(T), 1, 1);                   \
    return msl_exchange<T>(MSL_ADDRESS(p), value);                       \
  }                                                                      \
  template <class T>                                                     \
  MSL_INLINE bool atomic_compare_exchange_weak_explicit(                 \
      volatile space atomic<T>* p,                                       \
      thread T* expected,                                                \
      msl_element<T> value,                                              \
      memory_order,                                                      \
      memory_order) {                                                    \
    workbench_atomic(MSL_ADDRESS(p), sizeof(T), 1, 1);                   \
    return msl_compare_exchange<T>(MSL_ADDRESS(p), expected, value);     \
  }                                                                      \
  MSL_FETCH_IN(space, add)                                               \
  MSL_FETCH_IN(space, sub)                                               \
  MSL_FETCH_IN(space, min)                                               \
  MSL_FETCH_IN(space, max)                                               \
  MSL_FETCH_IN(space, and)                                               \
  MSL_FETCH_IN(space, or)                                                \
  MSL_FETCH_IN(space, xor)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
#undef MSL_ATOMICS
#undef MSL_FETCH_IN
#undef MSL_ADDRESS
#undef MSL_PLAIN

} // namespace metal
typedef metal::atomic<int> atomic_int;
typedef metal::atomic<uint> atomic_uint;
typedef metal::atomic<bool> atomic_bool;
typedef metal::atomic<float> atomic_float;
typedef metal::atomic<ulong> atomic_ulong;
namespace metal {
using ::atomic_bool;
using ::atomic_float;
using ::atomic_int;
using ::atomic_uint;
using ::atomic_ulong;
} // namespace metal
