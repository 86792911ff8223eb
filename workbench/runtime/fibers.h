#pragma once
// fibers.h: what fibers.cpp, meetings.cpp and threadgroup.cpp know of each
// other.

#include "runtime.h"

namespace workbench {

inline u32 bit(u32 lane) {
  return 1u << lane;
}

inline u32 first_lane(u32 mask) {
  return __builtin_ctz(mask);
}

// fibers.cpp

// All stacks are free again, and the random order starts anew.
void reset_fibers();
// The lane, or the k-th simdgroup after `start`, that goes on next.
u32 pick(u32 ready);
u32 pick_simdgroup(u32 k, u32 start, u32 simdgroups);
u32 random_below(u32 bound);
// Lets a ready lane and its simdgroup go on until all of them wait for the
// threadgroup or have ended. False if the launch was stopped.
bool run_simdgroup(Simdgroup& group);

// meetings.cpp

// No lane of the group can go on: let some of them meet. False if all that are
// left wait for the whole threadgroup.
bool meet(Simdgroup& group);
// A finding about a fiber that is not the one running.
Finding*
find_for(Fiber* fiber, Kind kind, const char* text, u32 a, u32 b, u32 c);

} // namespace workbench
