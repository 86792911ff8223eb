#pragma once
// gpu: what the processor's runtime does in include/msl, as instructions of
// gfx1030, a GPU with 32 lanes per simdgroup.

// See rewrite.py: a threadgroup variable.
#define MSL_THREADGROUP_VARIABLE(x) \
  static threadgroup msl_type_##x x __attribute__((loader_uninitialized))

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
};
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}

enum memory_order { memory_order_relaxed };

// The last argument keeps loads from device memory under way past a barrier of
// threadgroup memory, as Metal does.
#define MSL_FENCE(order, scope, flags)               \
  if (((uint)flags & (uint)mem_flags::mem_device)) { \
    __builtin_amdgcn_fence(order, scope);            \
  } else {                                           \
    __builtin_amdgcn_fence(order, scope, "local");   \
  }
MSL_INLINE void threadgroup_barrier(mem_flags flags) {
  MSL_FENCE(__ATOMIC_RELEASE, "workgroup", flags)
  __builtin_amdgcn_s_barrier();
  MSL_FENCE(__ATOMIC_ACQUIRE, "workgroup", flags)
}
// Lanes of a simdgroup go on together: it only keeps accesses in order.
MSL_INLINE void simdgroup_barrier(mem_flags flags) {
  MSL_FENCE(__ATOMIC_RELEASE, "wavefront", flags)
  __builtin_amdgcn_wave_barrier();
  MSL_FENCE(__ATOMIC_ACQUIRE, "wavefront", flags)
}
#undef MSL_FENCE

// Calls function(word) for each 32-bit word of x and puts the results together.
template <class T, class Function>
MSL_INLINE T msl_by_words(T x, Function function) {
  if constexpr (sizeof(T) < 4) {
    uint word = 0;
    __builtin_memcpy(&word, &x, sizeof(T));
    word = function(word);
    __builtin_memcpy(&x, &word, sizeof(T));
    return x;
  } else {
    struct Words {
      uint word[sizeof(T) / 4];
    };
    Words words = __builtin_bit_cast(Words, x);
    for (uint i = 0; i < sizeof(T) / 4; ++i) {
      words.word[i] = function(words.word[i]);
    }
    return __builtin_bit_cast(T, words);
  }
}

MSL_INLINE uint msl_lane() {
  return __builtin_amdgcn_mbcnt_lo(~0u, 0);
}
template <class T>
MSL_INLINE T msl_from_lane(T x, uint lane) {
  return msl_by_words(x, [=](uint word) __attribute__((always_inline)) {
    return (uint)__builtin_amdgcn_ds_bpermute(lane << 2, word);
  });
}
template <class T>
MSL_INLINE T simd_shuffle(T x, ushort lane) {
  return msl_from_lane(x, lane);
}
template <class T>
MSL_INLINE T simd_broadcast(T x, ushort lane) {
  return msl_from_lane(x, lane);
}
// One instruction where the mask is known, as unrolled loops know it.
template <class T>
MSL_INLINE T simd_shuffle_xor(T x, ushort mask) {
  return msl_by_words(x, [=](uint word) __attribute__((always_inline)) -> uint {
    switch (mask) {
      case 1:
        return __builtin_amdgcn_ds_swizzle(word, 1 << 10 | 31);
      case 2:
        return __builtin_amdgcn_ds_swizzle(word, 2 << 10 | 31);
      case 4:
        return __builtin_amdgcn_ds_swizzle(word, 4 << 10 | 31);
      case 8:
        return __builtin_amdgcn_ds_swizzle(word, 8 << 10 | 31);
      case 16:
        return __builtin_amdgcn_ds_swizzle(word, 16 << 10 | 31);
      default:
        return __builtin_amdgcn_ds_bpermute((msl_lane() ^ mask) << 2, word);
    }
  });
}
template <class T>
MSL_INLINE T simd_shuffle_up(T x, ushort by) {
  uint lane = msl_lane();
  return msl_from_lane(x, lane >= by ? lane - by : lane);
}

template <class T, class Op>
MSL_INLINE T msl_reduce(T x, Op op) {
  x = op(x, simd_shuffle_xor(x, 16));
  x = op(x, simd_shuffle_xor(x, 8));
  x = op(x, simd_shuffle_xor(x, 4));
  x = op(x, simd_shuffle_xor(x, 2));
  return op(x, simd_shuffle_xor(x, 1));
}
#define MSL_REDUCTION(name, expression)                                     \
  template <class T>                                                        \
  MSL_INLINE T simd_##name(T x) {                                           \
    return msl_reduce(x, [](T a, T b) __attribute__((always_inline)) -> T { \
      return expression;                                                    \
    });                                                                     \
  }
MSL_REDUCTION(sum, a + b)
MSL_REDUCTION(min, min(a, b))
MSL_REDUCTION(max, max(a, b))
#undef MSL_REDUCTION

template <class T>
MSL_INLINE T simd_prefix_exclusive_sum(T x) {
  T sum = x;
  for (ushort by = 1; by < 32; by *= 2) {
    T before = simd_shuffle_up(sum, by);
    sum += msl_lane() >= by ? before : T(0);
  }
  return sum - x;
}

template <class T>
struct atomic {
  T value;
};
#define MSL_SCOPE __ATOMIC_RELAXED, __MEMORY_SCOPE_DEVICE
#define MSL_FETCH(space, name)                                        \
  template <class T>                                                  \
  MSL_INLINE T atomic_fetch_##name##_explicit(                        \
      space atomic<T>* p, msl_element<T> value, memory_order) {       \
    return __scoped_atomic_fetch_##name(&p->value, value, MSL_SCOPE); \
  }
#define MSL_ATOMICS(space)                                                    \
  template <class T>                                                          \
  MSL_INLINE T atomic_load_explicit(const space atomic<T>* p, memory_order) { \
    return __scoped_atomic_load_n(&p->value, MSL_SCOPE);                      \
  }                                                                           \
  template <class T>                                                          \
  MSL_INLINE void atomic_store_explicit(                                      \
      space atomic<T>* p, msl_element<T> value, memory_order) {               \
    __scoped_atomic_store_n(&p->value, value, MSL_SCOPE);                     \
  }                                                                           \
  MSL_FETCH(space, add)                                                       \
  MSL_FETCH(space, sub)                                                       \
  MSL_FETCH(space, min)                                                       \
  MSL_FETCH(space, max)                                                       \
  MSL_FETCH(space, and)                                                       \
  MSL_FETCH(space, or)                                                        \
  MSL_FETCH(space, xor)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
#undef MSL_ATOMICS
#undef MSL_FETCH
#undef MSL_SCOPE

} // namespace metal

typedef metal::atomic<int> atomic_int;
typedef metal::atomic<uint> atomic_uint;
typedef metal::atomic<ulong> atomic_ulong;

namespace metal {
// What a kernel is given for a parameter in memory.
template <class T>
struct msl_given;
template <class T>
struct msl_given<T*> {
  using type = T*;
};
template <class T>
struct msl_given<T&> {
  using type = T*;
};
template <class T>
using msl_pointer = typename msl_given<T>::type;
} // namespace metal
