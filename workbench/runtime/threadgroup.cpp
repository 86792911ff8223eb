// threadgroup: the threads of one threadgroup, from their start to their end,
// and the barriers that all of them pass.

#include "fibers.h"

namespace workbench {

u32 g_epoch[2];

namespace {

u32 g_num_threads, g_num_simdgroups;

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
  reset_fibers();
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
      u32 next = pick_simdgroup(k, start, g_num_simdgroups);
      Simdgroup& group = g_simdgroups[next];
      if (group.ready && !run_simdgroup(group)) {
        return false;
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

} // namespace workbench
