#pragma once
// runtime: the functions of the workbench's runtime that kernels end up in.
// The layout of msl_meeting is that of workbench::Meeting.

struct msl_meeting {
  void* lane[32];
  uint mask;
  uint width;
};

// Convergent: the compiler must not move them into or out of branches, nor make
// two of one, as Metal's compiler must not.
#define MSL_MEETING_POINT __attribute__((convergent, nomerge))

extern "C" {
MSL_MEETING_POINT void
workbench_simd(void* data, void (*function)(msl_meeting*), uint width);
MSL_MEETING_POINT void workbench_simdgroup_barrier(uint flags);
MSL_MEETING_POINT void workbench_threadgroup_barrier(uint flags);
uint workbench_lane();
void workbench_inactive(const msl_meeting* meeting, uint lane, uint source);
void* workbench_variable(
    ulong* serial,
    void** place,
    size_t bytes,
    const char* name);
void workbench_read(const void* p, uint size);
void workbench_atomic(
    const volatile void* p,
    uint size,
    uint reads,
    uint writes);
}

// What lies at p, read behind the back of the checks.
template <class T>
__attribute__((noinline)) MSL_UNCHECKED T msl_peek(const T* p) {
  return *p;
}

// See rewrite.py: a threadgroup variable.
#define MSL_THREADGROUP_VARIABLE(x)                              \
  static ulong msl_serial_##x;                                   \
  static void* msl_place_##x;                                    \
  threadgroup msl_type_##x& x =                                  \
      *(threadgroup msl_type_##x*)(uintptr_t)workbench_variable( \
          &msl_serial_##x, &msl_place_##x, sizeof(msl_type_##x), #x)
