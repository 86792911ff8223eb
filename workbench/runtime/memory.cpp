// memory: where buffers and threadgroup variables lie.
//
// Each buffer of a checked launch lies 1 GiB into an address slot of 4 GiB of
// its own, so an index that is far off still names the buffer it was meant for,
// and no access of one buffer can fall into another. Threadgroup variables have
// slots of 1 MiB. Nothing is mapped but what a launch uses. Launches without
// checks run on the caller's arrays; only their threadgroup variables live
// here.

#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace workbench {

Region g_regions[1 + max_buffers + max_variables];
u32 g_num_variables;
u64 g_threadgroup_bytes;

namespace {

constexpr u64 page = 4096;
constexpr u64 buffer_slot = 4ull << 30, buffer_start = 1ull << 30;
constexpr u64 variable_slot = 1ull << 20, variable_start = 1ull << 19;
constexpr u64 buffers_bytes = buffer_slot * max_buffers;
constexpr u64 arena_bytes = buffers_bytes + variable_slot * max_variables;

u64 g_arena;

u64 whole_pages(u64 bytes) {
  return (bytes + page - 1) & ~(page - 1);
}

void open_arena() {
  if (g_arena) {
    return;
  }
  void* p = mmap(
      nullptr,
      arena_bytes,
      PROT_NONE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (p == MAP_FAILED) {
    abort();
  }
  g_arena = (u64)p;
}

void open_pages(u64 begin, u64 bytes) {
  if (mprotect((void*)begin, whole_pages(bytes), PROT_READ | PROT_WRITE)) {
    abort();
  }
}

// What nobody has written looks like: NaN in every float format.
void fill_unwritten(const Region& region) {
  memset((void*)region.begin, 0xff, region.end - region.begin);
}

} // namespace

void* map_zeros(u64 bytes) {
  void* p = mmap(
      nullptr,
      whole_pages(bytes + 1),
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  return p == MAP_FAILED ? nullptr : p;
}

void unmap(void* p, u64 bytes) {
  munmap(p, whole_pages(bytes + 1));
}

u32 region_of(u64 address) {
  u64 offset = address - g_arena;
  if (offset < buffers_bytes) {
    return 1 + offset / buffer_slot;
  }
  if (offset < arena_bytes) {
    return 1 + max_buffers + (offset - buffers_bytes) / variable_slot;
  }
  return 0;
}

void reset_variables() {
  for (u32 i = 0; i < g_num_variables; ++i) {
    Region& region = g_regions[1 + max_buffers + i];
    if (region.cells) {
      free_cells(region.cells, region.end - region.begin);
    }
    region = Region{};
  }
  g_num_variables = 0;
  g_threadgroup_bytes = 0;
}

void forget_threadgroup_contents() {
  for (u32 i = 0; i < g_num_variables; ++i) {
    fill_unwritten(g_regions[1 + max_buffers + i]);
  }
}

// A threadgroup variable of this launch; null when there are too many.
static void* add_variable(u64 bytes, const char* name, void* site) {
  open_arena();
  u32 i = g_num_variables;
  if (i == max_variables || bytes > variable_start) {
    find(
        Kind::threadgroup_memory,
        site,
        "%s takes %llu bytes",
        name,
        (unsigned long long)bytes);
    return nullptr;
  }
  ++g_num_variables;
  Region& region = g_regions[1 + max_buffers + i];
  region.begin = g_arena + buffers_bytes + i * variable_slot + variable_start;
  region.end = region.begin + bytes;
  region.space = threadgroup;
  strncpy(region.name, name, sizeof region.name - 1);
  open_pages(region.begin, bytes);
  fill_unwritten(region);
  if (g_launch.checks) {
    region.cells = new_cells(bytes);
  }
  g_threadgroup_bytes += (bytes + 15) & ~15ull;
  if (g_threadgroup_bytes > g_launch.threadgroup_limit) {
    find(
        Kind::threadgroup_memory,
        site,
        "threadgroup memory is %llu bytes with %s, the limit is %u",
        (unsigned long long)g_threadgroup_bytes,
        name,
        g_launch.threadgroup_limit);
  }
  return (void*)region.begin;
}

} // namespace workbench

using namespace workbench;

// A buffer of a checked launch: slot 0..31, filled by the caller through the
// returned pointer. `owned` is device memory that the kernel may write.
WB_EXPORT void* workbench_new_buffer(
    u32 slot,
    u64 bytes,
    const char* name,
    u32 read_only,
    u32 starts_written,
    u32 with_cells,
    u32 with_traffic) {
  open_arena();
  if (slot >= max_buffers || bytes > buffer_slot - 2 * buffer_start) {
    return nullptr;
  }
  Region& region = g_regions[1 + slot];
  region = Region{};
  region.begin = g_arena + slot * buffer_slot + buffer_start;
  region.end = region.begin + bytes;
  region.space = device;
  region.read_only = read_only;
  region.starts_written = starts_written;
  strncpy(region.name, name, sizeof region.name - 1);
  open_pages(region.begin, bytes + 1);
  if (!starts_written) {
    fill_unwritten(region);
  }
  if (with_cells) {
    region.cells = new_cells(bytes);
  }
  if (with_traffic) {
    region.traffic = new_traffic(bytes);
  }
  return (void*)region.begin;
}

WB_EXPORT void workbench_free_buffer(u32 slot) {
  Region& region = g_regions[1 + slot];
  if (!region.begin) {
    return;
  }
  u64 bytes = region.end - region.begin;
  if (region.cells) {
    free_cells(region.cells, bytes);
  }
  if (region.traffic) {
    free_traffic(region.traffic, bytes);
  }
  madvise((void*)region.begin, whole_pages(bytes + 1), MADV_DONTNEED);
  mprotect((void*)region.begin, whole_pages(bytes + 1), PROT_NONE);
  region = Region{};
}

// Threadgroup memory that the launch itself asks for, before it starts.
WB_EXPORT void* workbench_threadgroup_buffer(u64 bytes, const char* name) {
  return add_variable(bytes, name, nullptr);
}

// A threadgroup variable that kernel code declares. `serial` and `place` are
// the declaration's own: the launch it last ran in, and where it lay.
WB_EXPORT void*
workbench_variable(u64* serial, void** place, u64 bytes, const char* name) {
  if (*serial != g_launch_serial) {
    *place = add_variable(bytes, name, __builtin_return_address(0));
    if (!*place) {
      stop_launch();
    }
    *serial = g_launch_serial;
  }
  return *place;
}
