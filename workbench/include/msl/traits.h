#pragma once
// traits: <metal_type_traits>, as far as kernels use it.

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const {
    return v;
  }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <class T, class U>
struct is_same : false_type {};
template <class T>
struct is_same<T, T> : true_type {};
template <class T, class U>
inline constexpr bool is_same_v = is_same<T, U>::value;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T&> {
  using type = T;
};
template <class T>
struct remove_reference<T&&> {
  using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;

template <class T>
struct remove_const {
  using type = T;
};
template <class T>
struct remove_const<const T> {
  using type = T;
};
template <class T>
using remove_const_t = typename remove_const<T>::type;

template <class T>
struct remove_volatile {
  using type = T;
};
template <class T>
struct remove_volatile<volatile T> {
  using type = T;
};
template <class T>
struct remove_cv {
  using type = typename remove_volatile<remove_const_t<T>>::type;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;

template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<constant T> {
  using type = T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T>
struct remove_pointer {
  using type = T;
};
template <class T>
struct remove_pointer<T*> {
  using type = T;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
struct is_pointer : false_type {};
template <class T>
struct is_pointer<T*> : true_type {};
template <class T>
inline constexpr bool is_pointer_v = is_pointer<T>::value;

template <class T>
struct msl_is_integer : false_type {};
#define MSL_INTEGER(T) \
  template <>          \
  struct msl_is_integer<T> : true_type {};
MSL_INTEGER(bool)
MSL_INTEGER(char)
MSL_INTEGER(signed char)
MSL_INTEGER(uchar)
MSL_INTEGER(short)
MSL_INTEGER(ushort)
MSL_INTEGER(int)
MSL_INTEGER(uint)
MSL_INTEGER(long)
MSL_INTEGER(ulong)
#undef MSL_INTEGER
template <class T>
struct is_integral : bool_constant<msl_is_integer<remove_cv_t<T>>::value> {};
template <class T>
inline constexpr bool is_integral_v = is_integral<T>::value;

template <class T>
struct msl_is_float : false_type {};
template <>
struct msl_is_float<float> : true_type {};
template <>
struct msl_is_float<half> : true_type {};
template <>
struct msl_is_float<bfloat> : true_type {};
template <class T>
struct is_floating_point : bool_constant<msl_is_float<remove_cv_t<T>>::value> {
};
template <class T>
inline constexpr bool is_floating_point_v = is_floating_point<T>::value;

template <class T>
struct is_arithmetic
    : bool_constant<is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
inline constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

template <class T>
struct is_signed
    : bool_constant<
          is_floating_point_v<T> || (is_integral_v<T> && T(-1) < T(0))> {};
template <class T>
inline constexpr bool is_signed_v = is_signed<T>::value;
template <class T>
struct is_unsigned : bool_constant<is_integral_v<T> && !is_signed_v<T>> {};
template <class T>
inline constexpr bool is_unsigned_v = is_unsigned<T>::value;

template <class F, class T>
struct is_convertible : bool_constant<__is_convertible_to(F, T)> {};
template <class F, class T>
inline constexpr bool is_convertible_v = is_convertible<F, T>::value;
template <class T>
struct is_trivially_copyable : bool_constant<__is_trivially_copyable(T)> {};

template <class...>
struct disjunction : false_type {};
template <class A, class... Rest>
struct disjunction<A, Rest...>
    : conditional_t<bool(A::value), A, disjunction<Rest...>> {};
template <class... T>
inline constexpr bool disjunction_v = disjunction<T...>::value;
// MLX's type_traits build on the older, underscored names.
template <class... T>
using _disjunction = disjunction<T...>;
template <class...>
struct conjunction : true_type {};
template <class A, class... Rest>
struct conjunction<A, Rest...>
    : conditional_t<bool(A::value), conjunction<Rest...>, A> {};
template <class... T>
inline constexpr bool conjunction_v = conjunction<T...>::value;
template <class A>
struct negation : bool_constant<!bool(A::value)> {};

template <class T>
struct make_unsigned {
  using type = T;
};
template <>
struct make_unsigned<char> {
  using type = uchar;
};
template <>
struct make_unsigned<short> {
  using type = ushort;
};
template <>
struct make_unsigned<int> {
  using type = uint;
};
template <>
struct make_unsigned<long> {
  using type = ulong;
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;

template <class T>
T declval() noexcept;
template <class T>
MSL_INLINE void swap(thread T& a, thread T& b) {
  T old = a;
  a = b;
  b = old;
}

} // namespace metal
