#pragma once
// kernel.h: what a processor kernel and the code that calls it both see.
//
// A kernel file X_cpu.cpp is compiled once per instruction set. It includes
// simd.h, its own X_cpu.h and C headers, nothing else: an inline function of
// the standard library or of MLX compiled with AVX-512 could be the copy the
// linker keeps, and would then run on machines without it.

#include <cstdint>

namespace pyengine {

enum class Storage : uint8_t { float32, float16, bfloat16 };

// Rows of one launch. Longer inputs run as slices of this many, so that a
// weight is read once per slice.
constexpr int max_rows = 16;

} // namespace pyengine

// PYENGINE_DECLARE_KERNEL(name, arguments...) declares `void
// name(arguments...)` in the namespace of every instruction set of this build;
// PYENGINE_PICK_KERNEL(name) is the one for this machine (isa.h).
#if defined(PYENGINE_ISA)
#define PYENGINE_DECLARE_KERNEL(name, ...) \
  namespace PYENGINE_ISA {                 \
  void name(__VA_ARGS__);                  \
  }
#elif defined(PYENGINE_HAS_amx)
#define PYENGINE_DECLARE_KERNEL(name, ...) \
  namespace portable {                     \
  void name(__VA_ARGS__);                  \
  }                                        \
  namespace avx2 {                         \
  void name(__VA_ARGS__);                  \
  }                                        \
  namespace avx512 {                       \
  void name(__VA_ARGS__);                  \
  }                                        \
  namespace vnni {                         \
  void name(__VA_ARGS__);                  \
  }                                        \
  namespace amx {                          \
  void name(__VA_ARGS__);                  \
  }
#define PYENGINE_PICK_KERNEL(name) \
  pyengine::pick(                  \
      portable::name, avx2::name, avx512::name, vnni::name, amx::name)
#elif defined(PYENGINE_HAS_avx2)
#define PYENGINE_DECLARE_KERNEL(name, ...) \
  namespace portable {                     \
  void name(__VA_ARGS__);                  \
  }                                        \
  namespace avx2 {                         \
  void name(__VA_ARGS__);                  \
  }
#define PYENGINE_PICK_KERNEL(name) pyengine::pick(portable::name, avx2::name)
#elif defined(PYENGINE_HAS_neon)
#define PYENGINE_DECLARE_KERNEL(name, ...) \
  namespace neon {                         \
  void name(__VA_ARGS__);                  \
  }
#define PYENGINE_PICK_KERNEL(name) neon::name
#else
#define PYENGINE_DECLARE_KERNEL(name, ...) \
  namespace portable {                     \
  void name(__VA_ARGS__);                  \
  }
#define PYENGINE_PICK_KERNEL(name) portable::name
#endif

// A kernel of rows [begin, end), or of elements.
#define PYENGINE_DECLARE_ROWS(name, Args) \
  PYENGINE_DECLARE_KERNEL(name, const Args& args, int64_t begin, int64_t end)
