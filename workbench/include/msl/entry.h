#pragma once
// entry: how the generated entry points call a kernel. The layout of
// msl_context is that of workbench::ThreadContext.

struct msl_context {
  uint3 position_in_grid, position_in_group, group_position;
  uint3 group_size, groups, grid_size;
  uint thread_, lane, simdgroup, simdgroups;
};

namespace msl_entry {

// The type of parameter I of function type F.
template <int I, class A, class... Rest>
struct pick {
  using type = typename pick<I - 1, Rest...>::type;
};
template <class A, class... Rest>
struct pick<0, A, Rest...> {
  using type = A;
};
template <class F, int I>
struct parameter;
template <class... A, int I>
struct parameter<void(A...), I> {
  using type = typename pick<I, A...>::type;
};

template <class P>
struct bound;
template <class T>
struct bound<T*> {
  MSL_INLINE static T* of(void* p) {
    return (T*)(uintptr_t)p;
  }
};
template <class T>
struct bound<T&> {
  MSL_INLINE static T& of(void* p) {
    return *(T*)(uintptr_t)p;
  }
};
// Argument I of the kernel F: a buffer, or a built-in value.
template <class F, int I>
MSL_INLINE decltype(auto) buffer(void* p) {
  return bound<typename parameter<F, I>::type>::of(p);
}
template <class F, int I>
MSL_INLINE auto builtin(uint3 value) {
  using P = metal::remove_cv_t<typename parameter<F, I>::type>;
  if constexpr (metal::msl_vector<P>::is_vector) {
    P result;
    for (int i = 0; i < metal::msl_vector<P>::length; ++i) {
      result[i] = (metal::msl_element<P>)value[i];
    }
    return result;
  } else {
    return (P)value.x;
  }
}
template <class F, int I>
MSL_INLINE auto builtin(uint value) {
  return (metal::remove_cv_t<typename parameter<F, I>::type>)value;
}

// A value that the optimiser may know but the language does not: a function
// constant is no constant expression on a GPU either.
template <class T>
MSL_INLINE T not_constexpr(T value) {
  return value;
}

} // namespace msl_entry
