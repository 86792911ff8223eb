#pragma once
// types: scalars, vectors and the words that stand for attributes.
//
// device, constant, threadgroup and thread are macros from the command line:
// clang's opencl_* type attributes, which on x86 cost nothing at run time but
// keep pointers of different address spaces apart, as Metal's compiler does.

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
typedef _Float16 half;
typedef __bf16 bfloat;

// Library functions carry no line numbers of their own, so a report names the
// line of the kernel that called them.
#define MSL_INLINE inline __attribute__((always_inline, nodebug))
// Carried out for other lanes: not an access of the running one.
#define MSL_UNCHECKED \
  __attribute__((no_sanitize("kernel-address", "coverage"), nodebug))

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_INTERNAL inline __attribute__((always_inline))
#define METAL_ASM
#define is_function_constant_defined(name) msl_is_defined_##name
#define assert(condition) ((void)(condition))

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX ((half)65504.f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

#define MSL_VECTORS(T)                                              \
  typedef T T##2 __attribute__((ext_vector_type(2)));               \
  typedef T T##3 __attribute__((ext_vector_type(3)));               \
  typedef T T##4 __attribute__((ext_vector_type(4)));               \
  typedef T packed_##T##2                                           \
      __attribute__((ext_vector_type(2), aligned(__alignof__(T)))); \
  typedef T packed_##T##4                                           \
      __attribute__((ext_vector_type(4), aligned(__alignof__(T))));
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(bool)
#undef MSL_VECTORS

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

using ::bfloat;
using ::half;
using ::size_t;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;

} // namespace metal
using metal::vec;
