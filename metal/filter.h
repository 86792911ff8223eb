#pragma once
// filter.h: the best logits of a slice, in order: what filter_logits and an LM
// head that filters its own output share.
//
// A logit and its id make one 64-bit entry, and lower is better: higher logit,
// then lower id. No two are equal, so the best of the best of slices are the
// best of the row, however it was cut.

#include "common.h"

namespace pyengine {

// An integer that falls as the logit rises. -0 and 0 are the same logit.
inline uint key_of(float logit) {
  uint bits = as_type<uint>(logit);
  bits = bits == 0x80000000u ? 0 : bits;
  return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

inline float logit_of(uint key) {
  return as_type<float>(key >> 31 ? key : key ^ 0x7fffffffu);
}

inline ulong entry_of(float logit, uint id) {
  return ulong(key_of(logit)) << 32 | id;
}

// Stands where there is no logit: worse than all.
constant constexpr ulong no_entry = 0xffffffffffffffff;

// 0: finite; 1: -inf; 2: NaN or +inf. A row's flag is the highest of them.
inline uint flag_of(float logit) {
  uint bits = as_type<uint>(logit);
  bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? 0 : bits == 0xff800000u ? 1 : 2;
}

// Penalties and bias of one logit.
inline float edited(float logit, float factor, float delta) {
  return (logit > 0.0f ? logit / factor : logit * factor) + delta;
}

// The mask of a row: token t stays where bit t % 32 of word t / 32 is set.
inline const device uint* mask_of(const device uint* masks, uint row, uint V) {
  return masks + ulong(row) * ((V - 1) / 32 + 1);
}

// Bits of the mask from token `id` on, the first one lowest; as many as are
// left of its word.
inline uint allowed_from(const device uint* mask, uint id) {
  return mask[id / 32] >> id % 32;
}

// The sequence of a row; no number leads out of the Q that there are.
inline uint owner_of(const device int* owners, uint row, uint Q) {
  return uint(clamp(owners[row], 0, int(Q) - 1));
}

// Threadgroup memory of select_best.
template <ushort room>
struct Selection {
  ulong list[room]; // what may be among the best, in no order
  atomic_uint found; // how many, even beyond room
  uint parts[2][32]; // one number per simdgroup, twice: written while read
};

// The highest of one number per simdgroup.
inline uint group_max(
    uint value,
    threadgroup uint* parts,
    ushort simd,
    ushort simds,
    ushort lane) {
  if (lane == 0) {
    parts[simd] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_max(lane < simds ? parts[lane] : 0);
}

// Adds one number per thread. Calls in a row take turns with `parts`, which
// saves a barrier.
inline uint group_sum(
    uint value,
    threadgroup uint* parts,
    ushort simd,
    ushort simds,
    ushort lane) {
  value = simd_sum(value);
  if (lane == 0) {
    parts[simd] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simds ? parts[lane] : 0);
}

// Entries of a thread, in its registers.
template <ushort items>
struct Held {
  ulong of[items];

  // How many come before a trial one.
  uint below(ulong trial) const {
    uint found = 0;
#pragma unroll
    for (ushort i = 0; i < items; ++i) {
      found += of[i] < trial;
    }
    return found;
  }

  // Writes those up to a limit to list[at], list[at + 1], ...
  void write(ulong limit, threadgroup ulong* list, uint at, ushort room) const {
#pragma unroll
    for (ushort i = 0; i < items; ++i) {
      if (of[i] <= limit && of[i] != no_entry) {
        if (at < room) {
          list[at] = of[i];
        }
        ++at;
      }
    }
  }

  // A key that at least `count` entries of the threadgroup do not exceed, and
  // few others: so many of each simdgroup's threads have their best one there.
  uint bound(
      uint count,
      threadgroup uint* parts,
      ushort simd,
      ushort simds,
      ushort lane) const {
    ulong best = no_entry;
#pragma unroll
    for (ushort i = 0; i < items; ++i) {
      best = of[i] < best ? of[i] : best;
    }
    uint key = uint(best >> 32);
    uint rank = 0;
    for (ushort i = 0; i < 32; ++i) {
      rank += simd_shuffle(key, i) < key;
    }
    uint share = (count + simds - 1) / simds;
    uint own = share > 32 ? 0xffffffffu : simd_max(rank < share ? key : 0);
    return group_max(own, parts, simd, simds, lane);
  }
};

// A number that `count` of the entries of all threads do not exceed, bit by
// bit; there must be that many.
template <ushort room, typename Entries>
inline ulong limit_of(
    thread const Entries& entries,
    uint count,
    threadgroup Selection<room>& shared,
    ushort simd,
    ushort simds,
    ushort lane) {
  ulong limit = 0;
  for (short bit = 63; bit >= 0; --bit) {
    ulong trial = limit | 1ul << bit;
    uint below = group_sum(
        entries.below(trial), shared.parts[bit & 1], simd, simds, lane);
    if (below == count) {
      return trial - 1;
    }
    limit = below < count ? trial : limit;
  }
  return limit;
}

// Lists the entries up to a limit; returns how many there are.
template <ushort room, typename Entries>
inline uint list_entries(
    thread const Entries& entries,
    ulong limit,
    threadgroup Selection<room>& shared) {
  uint own = entries.below(limit < no_entry ? limit + 1 : no_entry);
  if (own > 0) {
    uint at =
        atomic_fetch_add_explicit(&shared.found, own, memory_order_relaxed);
    entries.write(limit, shared.list, at, room);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return atomic_load_explicit(&shared.found, memory_order_relaxed);
}

// Writes the best `count` of the entries of all threads, best first; no_entry
// where there are fewer. Out points to device or threadgroup memory.
//
// Entries tells a bound of what need be looked at: of 4096 random logits and a
// count of 64, some 130 are left. Each of those counts the ones better than
// itself. Where many are equal, more are left than the list holds; then the
// limit is found exactly.
//
// All threads must come; `room` is at least `count`. A barrier must follow
// before the memory is used again.
template <ushort room, typename Entries, typename Out>
inline void select_best(
    thread const Entries& entries,
    uint count,
    Out out,
    threadgroup Selection<room>& shared,
    ushort thread_index,
    ushort simd,
    ushort simds,
    ushort lane) {
  if (thread_index == 0) {
    atomic_store_explicit(&shared.found, 0, memory_order_relaxed);
  }
  uint bound = entries.bound(count, shared.parts[0], simd, simds, lane);
  uint found = list_entries(entries, ulong(bound) << 32 | 0xffffffffu, shared);
  if (found > room) {
    ulong limit = limit_of(entries, count, shared, simd, simds, lane);
    if (thread_index == 0) {
      atomic_store_explicit(&shared.found, 0, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    found = list_entries(entries, limit, shared);
  }

  uint threads = simds * 32u;
  for (uint i = thread_index; i < found; i += threads) {
    ulong own = shared.list[i];
    uint rank = 0;
    for (uint j = 0; j < found; ++j) {
      rank += shared.list[j] < own;
    }
    if (rank < count) {
      out[rank] = own;
    }
  }
  for (uint i = found + thread_index; i < count; i += threads) {
    out[i] = no_entry;
  }
}

} // namespace pyengine
