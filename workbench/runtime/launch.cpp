// launch: what Python calls to run a kernel.

#include "runtime.h"

#include <string.h>

namespace workbench {

Launch g_launch;
u64 g_launch_serial;
u32 g_group;

void reset_steps(); // hooks.cpp

namespace {

u32 common_divisor(u32 a, u32 b) {
  return b == 0 ? a : common_divisor(b, a % b);
}

// The k-th threadgroup to run. A random order is k times a step without common
// divisor, so that every threadgroup has its turn.
u32 pick_group(u32 k, u32 total) {
  switch (g_launch.order) {
    case Order::forward:
      return k;
    case Order::reverse:
      return total - 1 - k;
    case Order::random:
      break;
  }
  u32 step = g_launch.seed % total | 1;
  while (common_divisor(step, total) != 1) {
    step += 2;
  }
  return ((u64)k * step + g_launch.seed / 7) % total;
}

void find_unwritten() {
  for (u32 i = 1; i <= max_buffers; ++i) {
    const Region& region = g_regions[i];
    if (!region.begin || region.starts_written || !region.cells) {
      continue;
    }
    u64 offset = first_unwritten(region);
    if (offset != ~0ull) {
      g_current = nullptr;
      if (Finding* finding = find(
              Kind::unwritten_output, nullptr, "output that no thread wrote")) {
        finding->region = i;
        finding->offset = offset;
      }
    }
  }
}

} // namespace
} // namespace workbench

using namespace workbench;

// Between begin and run the caller sets up buffers and threadgroup memory.
WB_EXPORT void workbench_begin(const Launch* launch) {
  g_launch = *launch;
  ++g_launch_serial;
  g_current = nullptr;
  reset_checks();
  reset_variables();
}

// Returns the number of findings.
WB_EXPORT u32 workbench_run() {
  if (g_launch.counts) {
    reset_traffic();
  }
  prepare_fibers();
  const u32* grid = g_launch.grid;
  u32 total = grid[0] * grid[1] * grid[2];
  bool finished = true;
  for (u32 k = 0; k < total && finished; ++k) {
    g_group = pick_group(k, total);
    if (g_launch.checks) {
      forget_threadgroup_contents();
      reset_steps();
    }
    u32 x = g_group % grid[0];
    u32 y = g_group / grid[0] % grid[1];
    u32 z = g_group / grid[0] / grid[1];
    finished = run_threadgroup(x, y, z);
    if (g_launch.counts) {
      end_threadgroup_traffic();
    }
  }
  g_current = nullptr;
  if (finished && g_launch.checks) {
    find_unwritten();
  }
  return g_num_findings;
}

WB_EXPORT const Finding* workbench_findings() {
  return g_findings;
}

WB_EXPORT const char* workbench_region_name(u32 region) {
  return g_regions[region].name;
}

WB_EXPORT u64 workbench_threadgroup_bytes() {
  return g_threadgroup_bytes;
}

// float to bfloat16, to nearest even: clang calls it, and not every C library
// of a compiler has it.
WB_EXPORT __bf16 __truncsfbf2(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  bits = nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  uint16_t high = bits >> 16;
  __bf16 result;
  memcpy(&result, &high, 2);
  return result;
}

WB_EXPORT __bf16 __truncdfbf2(double value) {
  return __truncsfbf2((float)value);
}
