#pragma once
// runtime.h: the words that the parts of the workbench's runtime share.
//
//   fibers.cpp       GPU threads as fibers
//   meetings.cpp     simd functions and simdgroup barriers
//   threadgroup.cpp  the threads of a threadgroup, and its barriers
//   memory.cpp       where buffers and threadgroup variables lie
//   checks.cpp       what an access may not do: bounds, races, first reads
//   traffic.cpp      what an access costs: bytes, sectors, cache lines
//   hooks.cpp        what the compiler's instrumentation calls
//   launch.cpp       what Python calls
//
// One launch at a time and one host thread: a GPU's parallelism is played one
// lane at a time, in an order that the caller picks. Only C is used, and no C++
// library, because a bare compiler without one must be able to build this.

#include <stdint.h>

#define WB_EXPORT extern "C" __attribute__((visibility("default")))

namespace workbench {

using u8 = uint8_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

constexpr u32 simd_width = 32;
constexpr u32 max_threads = 1024; // of one threadgroup
constexpr u32 max_simdgroups = max_threads / simd_width;

// Barrier flags, as metal::mem_flags numbers them, and the two kinds of shared
// memory that they order.
enum Space : u32 { device = 0, threadgroup = 1 };
constexpr u32 mem_device = 1;
constexpr u32 mem_threadgroup = 2;

enum class Order : u32 { forward = 0, reverse = 1, random = 2 };

// Kinds of findings; report.py has their names in the same order.
enum class Kind : u32 {
  out_of_bounds = 1,
  race,
  same_value_race,
  uninitialised_read,
  unwritten_output,
  barrier_divergence,
  simd_divergence,
  inactive_lane,
  misaligned,
  read_only_write,
  threadgroup_memory,
  unbound_buffer,
  endless_loop,
};

// One finding, as Python reads it. A site is an address in the kernel's code.
struct Finding {
  Kind kind;
  u32 group, thread; // who: linear threadgroup and thread in it
  u32 other_group, other_thread; // with whom, for races and divergence
  u32 size; // of the access, in bytes
  u64 site, other_site;
  i64 offset; // into the region
  u32 region; // 0: none
  u32 times;
  char text[160];
};

// What the entry point of a kernel reads its built-in arguments from. The
// layout is repeated in include/msl/entry.h.
struct ThreadContext {
  alignas(16) u32 position_in_grid[4];
  alignas(16) u32 position_in_group[4];
  alignas(16) u32 group_position[4];
  alignas(16) u32 group_size[4];
  alignas(16) u32 groups[4];
  alignas(16) u32 grid_size[4];
  u32 thread, lane, simdgroup, simdgroups;
};

using Entry = void (*)(void* const* buffers, const ThreadContext* context);

// What Python hands over to start a launch.
struct Launch {
  u32 grid[3]; // in threadgroups
  u32 group[3]; // threads
  Entry entry;
  void* const* buffers;
  u64 code_begin, code_end; // where the kernel's object is mapped
  u64 step_limit; // basic blocks of one threadgroup
  u32 threadgroup_limit; // bytes
  Order order;
  u32 seed;
  u32 checks; // 1: the object is instrumented and findings are wanted
  u32 counts; // 1: traffic is wanted
};

extern Launch g_launch;
extern u64 g_launch_serial;
extern u32 g_group; // linear index of the threadgroup that runs

// ---- fibers.cpp, meetings.cpp, threadgroup.cpp

// The lanes' arguments of one simd function that is about to be carried out.
struct Meeting {
  void* lane[simd_width];
  u32 mask; // lanes that take part
  u32 width; // 32, or 4 for quad functions
};
using SimdFunction = void (*)(Meeting*);

enum class State : u8 {
  fresh,
  ready,
  at_simd,
  at_simd_barrier,
  at_barrier,
  done
};

struct Fiber {
  void* stack_pointer;
  u8* stack; // its top
  State state;
  u32 thread, lane, simdgroup;
  // What it waits for.
  void* site;
  void* data;
  SimdFunction function;
  u32 width;
  u32 flags;
  ThreadContext context;
};

// Lanes by what they do, one bit each.
struct Simdgroup {
  u32 first, started;
  u32 live, ready, at_simd, at_simd_barrier, at_barrier;
  u32 epoch[2]; // simdgroup barriers passed, by space
};

extern Fiber* g_current; // null while no kernel code runs
extern Fiber g_fibers[max_threads];
extern Simdgroup g_simdgroups[max_simdgroups];
extern u32 g_epoch[2]; // threadgroup barriers passed, by space
extern u64 g_stacks_begin, g_stacks_end;

void prepare_fibers(); // once per launch
bool run_threadgroup(u32 x, u32 y, u32 z); // false: stopped by a finding
[[noreturn]] void stop_launch(); // leave the current fiber for good

// ---- memory.cpp

struct Cell;
struct Region {
  u64 begin, end;
  Space space;
  bool read_only, starts_written;
  char name[64];
  Cell* cells; // one per byte, or null
  struct Traffic* traffic; // or null
};

constexpr u32 max_buffers = 32;
constexpr u32 max_variables = 64;
// Regions 1..32 are buffers, 33..96 threadgroup variables; 0 is none.
extern Region g_regions[1 + max_buffers + max_variables];
extern u32 g_num_variables;
extern u64 g_threadgroup_bytes;

u32 region_of(u64 address); // by slot; 0 outside of the arena
void reset_variables();
void forget_threadgroup_contents();
void* map_zeros(u64 bytes);
void unmap(void* p, u64 bytes);

// ---- checks.cpp

// Bytes of `region` are read or written by the current fiber.
void check_access(
    Region& region,
    u64 address,
    u32 size,
    bool write,
    bool atomic,
    void* site);
void settle_write(); // decide a write-write race by the values, if one waits
void reset_checks();
Cell* new_cells(u64 bytes);
void free_cells(Cell* cells, u64 bytes);
u64 first_unwritten(const Region& region); // offset, or ~0

// Adds a finding, or counts one more of a known (kind, site, other site).
Finding* find(Kind kind, void* site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
extern Finding g_findings[64];
extern u32 g_num_findings;

// ---- traffic.cpp

void count_access(
    Region& region,
    u64 address,
    u32 size,
    bool write,
    bool atomic,
    void* site);
void end_threadgroup_traffic();
void reset_traffic();
Traffic* new_traffic(u64 bytes);
void free_traffic(Traffic* traffic, u64 bytes);

} // namespace workbench
