// meetings: lanes of one simdgroup that wait for each other, at a simd function
// or at a simdgroup barrier.

#include "fibers.h"

namespace workbench {

namespace {

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

} // namespace

Finding*
find_for(Fiber* fiber, Kind kind, const char* text, u32 a, u32 b, u32 c) {
  Fiber* running = g_current;
  g_current = fiber;
  Finding* finding = find(kind, fiber->site, text, a, b, c);
  g_current = running;
  return finding;
}

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

} // namespace workbench

using namespace workbench;

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
