// fibers: every GPU thread is a fiber with its own stack.
//
// A lane runs until it meets others (a simd function or a barrier) or ends. The
// last lane to arrive carries the simd function out for all, so a meeting costs
// one switch per lane. Lanes of one simdgroup run one after the other; only
// when none can go on does the next simdgroup run. Kernels without meetings
// never switch: all threads run on one stack, one after the other.

#include "runtime.h"

#include <string.h>
#include <sys/mman.h>

#ifndef __x86_64__
#error "the workbench runs on x86-64 Linux"
#endif

// Saves what a call must preserve, then goes on where `to` left off.
asm(R"(
.text
.p2align 4
.type workbench_switch, @function
workbench_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size workbench_switch, .-workbench_switch
)");
extern "C" __attribute__((visibility("hidden"))) void workbench_switch(
    void** save,
    void* to);

namespace workbench {

Fiber* g_current;
Fiber g_fibers[max_threads];
Simdgroup g_simdgroups[max_simdgroups];
u32 g_epoch[2];
u64 g_stacks_begin, g_stacks_end;

namespace {

constexpr u64 stack_bytes = 256 << 10;
u8* g_free_stacks[max_threads + 1];
u32 g_num_free_stacks;

u32 g_num_threads, g_num_simdgroups;
void* g_scheduler; // stack pointer of run_threadgroup
bool g_stopped;
u32 g_random;

u32 bit(u32 lane) {
  return 1u << lane;
}

u32 first_lane(u32 mask) {
  return __builtin_ctz(mask);
}

u32 count(u32 mask) {
  return __builtin_popcount(mask);
}

u32 random_below(u32 bound) {
  g_random = g_random * 1664525u + 1013904223u;
  return (g_random >> 16) % bound;
}

// The lane that goes on next, out of those that can.
u32 pick(u32 ready) {
  switch (g_launch.order) {
    case Order::forward:
      return first_lane(ready);
    case Order::reverse:
      return 31 - __builtin_clz(ready);
    case Order::random:
      break;
  }
  for (u32 skip = random_below(count(ready)); skip > 0; --skip) {
    ready &= ready - 1;
  }
  return first_lane(ready);
}

// The k-th simdgroup to go on, of those of the threadgroup.
u32 pick_simdgroup(u32 k, u32 start) {
  switch (g_launch.order) {
    case Order::forward:
      return k;
    case Order::reverse:
      return g_num_simdgroups - 1 - k;
    case Order::random:
      break;
  }
  return (start + k) % g_num_simdgroups;
}

void fill_free_stacks() {
  if (!g_stacks_begin) {
    u64 bytes = stack_bytes * max_threads;
    g_stacks_begin = (u64)mmap(
        nullptr,
        bytes,
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1,
        0);
    g_stacks_end = g_stacks_begin + bytes;
  }
  g_num_free_stacks = 0;
  for (u32 i = max_threads; i-- > 0;) {
    // Tops are staggered, or all stacks would fight for the same cache sets.
    u64 top = g_stacks_begin + (i + 1) * stack_bytes - (i * 1344 & 0x7fc0);
    g_free_stacks[g_num_free_stacks++] = (u8*)top;
  }
}

void fiber_main();

void enter(Fiber* fiber, void** save) {
  if (fiber->state == State::fresh) {
    fiber->stack = g_free_stacks[--g_num_free_stacks];
    void** top = (void**)fiber->stack;
    top[-1] = nullptr; // no caller
    top[-2] = (void*)fiber_main;
    memset(top - 8, 0, 6 * sizeof(void*)); // registers
    fiber->stack_pointer = top - 8;
  }
  fiber->state = State::ready;
  g_current = fiber;
  workbench_switch(save, fiber->stack_pointer);
}

void leave_to_scheduler(void** save) {
  workbench_switch(save, g_scheduler);
}

// A finding about a fiber that is not the one running.
Finding*
find_for(Fiber* fiber, Kind kind, const char* text, u32 a, u32 b, u32 c) {
  Fiber* running = g_current;
  g_current = fiber;
  Finding* finding = find(kind, fiber->site, text, a, b, c);
  g_current = running;
  return finding;
}

void carry_out(Simdgroup& group, u32 lanes) {
  Meeting meeting;
  Fiber* one = &g_fibers[group.first + first_lane(lanes)];
  meeting.mask = lanes;
  meeting.width = one->width;
  for (u32 m = lanes; m; m &= m - 1) {
    u32 lane = first_lane(m);
    Fiber& fiber = g_fibers[group.first + lane];
    meeting.lane[lane] = fiber.data;
    fiber.state = State::ready;
  }
  one->function(&meeting);
  group.at_simd &= ~lanes;
  group.ready |= lanes;
}

u32 lanes_at(const Simdgroup& group, u32 lanes, void* site) {
  u32 found = 0;
  for (u32 m = lanes; m; m &= m - 1) {
    u32 lane = first_lane(m);
    if (g_fibers[group.first + lane].site == site) {
      found |= bit(lane);
    }
  }
  return found;
}

// Lanes that stand at different simd functions meet in the order of the code,
// as they do when a GPU runs the branches of a condition one after the other.
void meet_at_simd(Simdgroup& group) {
  u32 waiting = group.at_simd;
  Fiber* one = &g_fibers[group.first + first_lane(waiting)];
  u32 width = one->width;
  u32 eligible = waiting;
  u32 expected = group.started;
  if (width != simd_width) {
    u32 quad = ((1u << width) - 1) << (first_lane(waiting) & ~(width - 1));
    eligible &= quad;
    expected &= quad;
  }
  void* site = one->site;
  for (u32 m = eligible; m; m &= m - 1) {
    Fiber& fiber = g_fibers[group.first + first_lane(m)];
    if (fiber.width == width && fiber.site < site) {
      site = fiber.site;
    }
  }
  u32 lanes = lanes_at(group, eligible, site);
  if (lanes != expected && g_launch.checks) {
    find_for(
        &g_fibers[group.first + first_lane(lanes)],
        Kind::simd_divergence,
        "simd function reached by lanes 0x%08x of 0x%08x (0x%08x have ended)",
        lanes,
        expected,
        group.started & ~group.live);
  }
  carry_out(group, lanes);
}

void pass_simdgroup_barrier(Simdgroup& group) {
  u32 lanes = group.at_simd_barrier;
  Fiber* one = &g_fibers[group.first + first_lane(lanes)];
  u32 together = lanes_at(group, lanes, one->site);
  if (lanes != group.live || together != lanes) {
    find_for(
        one,
        Kind::barrier_divergence,
        "simdgroup_barrier reached by lanes 0x%08x of 0x%08x (0x%08x at this one)",
        lanes,
        group.live,
        together);
    stop_launch();
  }
  group.epoch[threadgroup] += (one->flags & mem_threadgroup) != 0;
  group.epoch[device] += (one->flags & mem_device) != 0;
  group.ready |= lanes;
  group.at_simd_barrier = 0;
  for (u32 m = lanes; m; m &= m - 1) {
    g_fibers[group.first + first_lane(m)].state = State::ready;
  }
}

// No lane of the group can go on: let some of them meet. False if all that are
// left wait for the whole threadgroup.
bool meet(Simdgroup& group) {
  if (group.at_simd) {
    meet_at_simd(group);
    return true;
  }
  if (group.at_simd_barrier) {
    pass_simdgroup_barrier(group);
    return true;
  }
  return false;
}

// The current fiber waits; another goes on. Returns when the fiber may.
void wait(Fiber* fiber, Simdgroup& group) {
  for (;;) {
    if (group.ready) {
      u32 lane = pick(group.ready);
      group.ready &= ~bit(lane);
      Fiber* next = &g_fibers[group.first + lane];
      if (next != fiber) {
        enter(next, &fiber->stack_pointer);
      } else {
        g_current = fiber;
      }
      return;
    }
    if (!meet(group)) {
      leave_to_scheduler(&fiber->stack_pointer);
      return;
    }
  }
}

// What runs on a fresh stack: one thread after the other, while the next one
// has not begun yet, so threads that never wait share a stack.
void fiber_main() {
  Fiber* fiber = g_current;
  u8* stack = fiber->stack;
  Simdgroup& group = g_simdgroups[fiber->simdgroup];
  void* gone;
  for (;;) {
    g_launch.entry(g_launch.buffers, &fiber->context);
    settle_write();
    fiber->state = State::done;
    group.live &= ~bit(fiber->lane);
    while (!group.ready) {
      if (!meet(group)) {
        g_free_stacks[g_num_free_stacks++] = stack;
        leave_to_scheduler(&gone);
        __builtin_unreachable();
      }
    }
    u32 lane = pick(group.ready);
    group.ready &= ~bit(lane);
    fiber = &g_fibers[group.first + lane];
    if (fiber->state != State::fresh) {
      g_free_stacks[g_num_free_stacks++] = stack;
      enter(fiber, &gone);
      __builtin_unreachable();
    }
    fiber->stack = stack;
    fiber->state = State::ready;
    g_current = fiber;
  }
}

void start_threads(u32 x, u32 y, u32 z) {
  const u32* size = g_launch.group;
  for (u32 i = 0; i < g_num_simdgroups; ++i) {
    Simdgroup& group = g_simdgroups[i];
    group.live = group.ready = group.started;
    group.at_simd = group.at_simd_barrier = group.at_barrier = 0;
    group.epoch[0] = group.epoch[1] = 0;
  }
  g_epoch[0] = g_epoch[1] = 0;
  for (u32 i = 0; i < g_num_threads; ++i) {
    ThreadContext& context = g_fibers[i].context;
    g_fibers[i].state = State::fresh;
    context.group_position[0] = x;
    context.group_position[1] = y;
    context.group_position[2] = z;
    context.position_in_grid[0] = x * size[0] + context.position_in_group[0];
    context.position_in_grid[1] = y * size[1] + context.position_in_group[1];
    context.position_in_grid[2] = z * size[2] + context.position_in_group[2];
  }
}

// Every live thread waits at a threadgroup barrier: the same one?
bool pass_barrier() {
  Fiber* first = nullptr;
  u32 ended = 0;
  for (u32 i = 0; i < g_num_threads; ++i) {
    Fiber& fiber = g_fibers[i];
    if (fiber.state == State::done) {
      ++ended;
    } else if (!first) {
      first = &fiber;
    } else if (fiber.site != first->site) {
      Finding* finding = find_for(
          &fiber,
          Kind::barrier_divergence,
          "threads %u and %u wait at different threadgroup barriers",
          first->thread,
          fiber.thread,
          0);
      if (finding) {
        finding->other_site = (u64)first->site;
        finding->other_thread = first->thread;
      }
      return false;
    }
  }
  if (ended > 0) {
    find_for(
        first,
        Kind::barrier_divergence,
        "threadgroup_barrier not reached by %u of %u threads, which have ended",
        ended,
        g_num_threads,
        0);
    return false;
  }
  g_epoch[threadgroup] += (first->flags & mem_threadgroup) != 0;
  g_epoch[device] += (first->flags & mem_device) != 0;
  for (u32 i = 0; i < g_num_simdgroups; ++i) {
    g_simdgroups[i].ready = g_simdgroups[i].at_barrier;
    g_simdgroups[i].at_barrier = 0;
  }
  for (u32 i = 0; i < g_num_threads; ++i) {
    g_fibers[i].state = State::ready;
  }
  return true;
}

} // namespace

void prepare_fibers() {
  const u32* size = g_launch.group;
  g_num_threads = size[0] * size[1] * size[2];
  g_num_simdgroups = (g_num_threads + simd_width - 1) / simd_width;
  g_random = g_launch.seed;
  g_current = nullptr;
  g_stopped = false;
  fill_free_stacks();
  for (u32 i = 0; i < g_num_simdgroups; ++i) {
    u32 threads = g_num_threads - i * simd_width;
    g_simdgroups[i].first = i * simd_width;
    g_simdgroups[i].started = threads >= simd_width ? ~0u : bit(threads) - 1;
  }
  for (u32 i = 0; i < g_num_threads; ++i) {
    Fiber& fiber = g_fibers[i];
    fiber.thread = i;
    fiber.lane = i % simd_width;
    fiber.simdgroup = i / simd_width;
    ThreadContext& context = fiber.context;
    context.position_in_group[0] = i % size[0];
    context.position_in_group[1] = i / size[0] % size[1];
    context.position_in_group[2] = i / size[0] / size[1];
    for (int axis = 0; axis < 3; ++axis) {
      context.group_size[axis] = size[axis];
      context.groups[axis] = g_launch.grid[axis];
      context.grid_size[axis] = g_launch.grid[axis] * size[axis];
    }
    context.thread = i;
    context.lane = fiber.lane;
    context.simdgroup = fiber.simdgroup;
    context.simdgroups = g_num_simdgroups;
  }
}

bool run_threadgroup(u32 x, u32 y, u32 z) {
  start_threads(x, y, z);
  for (;;) {
    bool waiting = false;
    u32 start = random_below(g_num_simdgroups);
    for (u32 k = 0; k < g_num_simdgroups; ++k) {
      Simdgroup& group = g_simdgroups[pick_simdgroup(k, start)];
      if (group.ready) {
        u32 lane = pick(group.ready);
        group.ready &= ~bit(lane);
        enter(&g_fibers[group.first + lane], &g_scheduler);
        g_current = nullptr;
        if (g_stopped) {
          return false;
        }
      }
      waiting |= group.live != 0;
    }
    if (!waiting) {
      return true;
    }
    // A simdgroup is left only when its live lanes all wait at the barrier.
    if (!pass_barrier()) {
      return false;
    }
  }
}

void stop_launch() {
  g_stopped = true;
  void* gone;
  leave_to_scheduler(&gone);
  __builtin_unreachable();
}

} // namespace workbench

using namespace workbench;

// The functions below are called by the kernel, through include/msl.

WB_EXPORT __attribute__((noinline)) void
workbench_simd(void* data, SimdFunction function, u32 width) {
  Fiber* fiber = g_current;
  Simdgroup& group = g_simdgroups[fiber->simdgroup];
  settle_write();
  fiber->site = __builtin_return_address(0);
  fiber->data = data;
  fiber->function = function;
  fiber->width = width;
  fiber->state = State::at_simd;
  group.at_simd |= bit(fiber->lane);
  wait(fiber, group);
}

WB_EXPORT __attribute__((noinline)) void workbench_simdgroup_barrier(
    u32 flags) {
  Fiber* fiber = g_current;
  Simdgroup& group = g_simdgroups[fiber->simdgroup];
  settle_write();
  fiber->site = __builtin_return_address(0);
  fiber->flags = flags;
  fiber->state = State::at_simd_barrier;
  group.at_simd_barrier |= bit(fiber->lane);
  wait(fiber, group);
}

WB_EXPORT __attribute__((noinline)) void workbench_threadgroup_barrier(
    u32 flags) {
  Fiber* fiber = g_current;
  Simdgroup& group = g_simdgroups[fiber->simdgroup];
  settle_write();
  fiber->site = __builtin_return_address(0);
  fiber->flags = flags;
  fiber->state = State::at_barrier;
  group.at_barrier |= bit(fiber->lane);
  wait(fiber, group);
}

WB_EXPORT u32 workbench_lane() {
  return g_current->lane;
}

// A simd function would read a lane that takes no part in it.
WB_EXPORT void
workbench_inactive(const Meeting* meeting, u32 lane, u32 source) {
  Fiber* one = g_current;
  Fiber* fiber = &g_fibers[g_simdgroups[one->simdgroup].first + lane];
  if (g_launch.checks) {
    find_for(
        fiber,
        Kind::inactive_lane,
        "lane %u reads lane %u, which takes no part (lanes 0x%08x do)",
        lane,
        source,
        meeting->mask);
  }
}
