// fibers: every GPU thread is a fiber with its own stack.
//
// A lane runs until it meets others (a simd function or a barrier) or ends. The
// last lane to arrive carries the simd function out for all, so a meeting costs
// one switch per lane. Lanes of one simdgroup run one after the other; only
// when none can go on does the next simdgroup run. Kernels without meetings
// never switch: all threads run on one stack, one after the other.

#include "fibers.h"

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
u64 g_stacks_begin, g_stacks_end;

namespace {

constexpr u64 stack_bytes = 256 << 10;
u8* g_free_stacks[max_threads + 1];
u32 g_num_free_stacks;

void* g_scheduler; // stack pointer of run_simdgroup
bool g_stopped;
u32 g_random;

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

} // namespace

u32 random_below(u32 bound) {
  g_random = g_random * 1664525u + 1013904223u;
  return (g_random >> 16) % bound;
}

u32 pick(u32 ready) {
  switch (g_launch.order) {
    case Order::forward:
      return first_lane(ready);
    case Order::reverse:
      return 31 - __builtin_clz(ready);
    case Order::random:
      break;
  }
  for (u32 skip = random_below(__builtin_popcount(ready)); skip > 0; --skip) {
    ready &= ready - 1;
  }
  return first_lane(ready);
}

u32 pick_simdgroup(u32 k, u32 start, u32 simdgroups) {
  switch (g_launch.order) {
    case Order::forward:
      return k;
    case Order::reverse:
      return simdgroups - 1 - k;
    case Order::random:
      break;
  }
  return (start + k) % simdgroups;
}

void reset_fibers() {
  g_random = g_launch.seed;
  g_current = nullptr;
  g_stopped = false;
  fill_free_stacks();
}

bool run_simdgroup(Simdgroup& group) {
  u32 lane = pick(group.ready);
  group.ready &= ~bit(lane);
  enter(&g_fibers[group.first + lane], &g_scheduler);
  g_current = nullptr;
  return !g_stopped;
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
