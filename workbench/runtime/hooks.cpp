// hooks: what instrumented kernel code calls before each access and in each
// basic block. The names are those that clang's -fsanitize=kernel-address and
// -fsanitize-coverage=trace-pc call; no sanitizer library takes part.

#include "runtime.h"

#include <string.h>

namespace workbench {

void check_elsewhere(
    u64 address,
    u32 size,
    bool write,
    void* site); // checks.cpp

static u64 g_steps;

void reset_steps() {
  g_steps = 0;
}

namespace {

inline __attribute__((always_inline)) void
on_access(const void* p, u64 size, bool write, bool atomic, void* site) {
  u64 address = (u64)p;
  // A lane's own variables, most often.
  if (address - g_stacks_begin < g_stacks_end - g_stacks_begin || !g_current) {
    return;
  }
  settle_write();
  u32 index = region_of(address);
  if (!index) {
    check_elsewhere(address, size, write, site);
    return;
  }
  Region& region = g_regions[index];
  check_access(region, address, size, write, atomic, site);
  if (region.traffic) {
    count_access(region, address, size, write, atomic, site);
  }
}

// The compiler uses the sized hooks only where it takes the address for a
// multiple of the size.
inline __attribute__((always_inline)) void
on_aligned(const void* p, u32 size, bool write, void* site) {
  if (__builtin_expect(((u64)p & (size - 1)) != 0, 0) && g_current) {
    u32 alignment = 1u << __builtin_ctzll((u64)p);
    Finding* finding = find(
        Kind::misaligned,
        site,
        "%s of %u bytes at an address that is a multiple of %u only",
        write ? "write" : "read",
        size,
        alignment);
    u32 index = region_of((u64)p);
    if (finding && index) {
      finding->region = index;
      finding->offset = (u64)p - g_regions[index].begin;
      finding->size = size;
    }
  }
  on_access(p, size, write, false, site);
}

} // namespace
} // namespace workbench

using namespace workbench;

#define SITE __builtin_return_address(0)

#define SIZED_HOOKS(size)                                \
  WB_EXPORT void __asan_load##size##_noabort(void* p) {  \
    on_aligned(p, size, false, SITE);                    \
  }                                                      \
  WB_EXPORT void __asan_store##size##_noabort(void* p) { \
    on_aligned(p, size, true, SITE);                     \
  }
SIZED_HOOKS(1)
SIZED_HOOKS(2)
SIZED_HOOKS(4)
SIZED_HOOKS(8)
SIZED_HOOKS(16)

WB_EXPORT void __asan_loadN_noabort(void* p, u64 size) {
  on_access(p, size, false, false, SITE);
}

WB_EXPORT void __asan_storeN_noabort(void* p, u64 size) {
  on_access(p, size, true, false, SITE);
}

WB_EXPORT void* __asan_memcpy(void* to, const void* from, u64 size) {
  on_access(from, size, false, false, SITE);
  on_access(to, size, true, false, SITE);
  return memcpy(to, from, size);
}

WB_EXPORT void* __asan_memmove(void* to, const void* from, u64 size) {
  on_access(from, size, false, false, SITE);
  on_access(to, size, true, false, SITE);
  return memmove(to, from, size);
}

WB_EXPORT void* __asan_memset(void* to, int value, u64 size) {
  on_access(to, size, true, false, SITE);
  return memset(to, value, size);
}

WB_EXPORT void __asan_handle_no_return() {}

WB_EXPORT void __sanitizer_cov_trace_pc() {
  if (++g_steps == g_launch.step_limit) {
    find(
        Kind::endless_loop,
        SITE,
        "a threadgroup went through %llu basic blocks without an end",
        (unsigned long long)g_launch.step_limit);
    stop_launch();
  }
}

// A read that include/msl carries out uninstrumented.
WB_EXPORT void workbench_read(const void* p, u32 size) {
  on_access(p, size, false, false, SITE);
}

// An atomic operation, which include/msl/atomic.h carries out uninstrumented.
WB_EXPORT void
workbench_atomic(const volatile void* p, u32 size, u32 reads, u32 writes) {
  if (!g_launch.checks) {
    return;
  }
  if (reads) {
    on_access((const void*)p, size, false, true, SITE);
  }
  if (writes) {
    on_access((const void*)p, size, true, true, SITE);
  }
}
