// checks: what an access may not do.
//
// Every byte of shared memory that can be written has a cell: who wrote it
// last, and two of those who read it since, each with the barriers they had
// passed. Two accesses of different threads, one of them a write, are ordered
// only by a barrier between them: a threadgroup barrier with the flag of that
// memory, or a simdgroup barrier when both are of one simdgroup. Nothing orders
// threadgroups. So a race is found whatever order the lanes really ran in.

#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

namespace workbench {

// Who: bit 31 atomic, then 21 bits of threadgroup + 1, then 10 of thread. 0
// nobody.
struct Mark {
  u32 who;
  u32 epoch; // threadgroup barriers << 16 | simdgroup barriers
  u32 site; // from the start of the kernel's code
};

struct Cell {
  Mark writer, reader, other_reader;
};

Finding g_findings[64];
u32 g_num_findings;

namespace {

constexpr u32 atomic_bit = 1u << 31;
constexpr u32 thread_bits = 10;

u32 group_key() {
  return (g_group + 1) << thread_bits;
}

u32 id(const Mark& mark) {
  return mark.who & ~atomic_bit;
}

u32 thread_of(u32 who) {
  return who & ((1u << thread_bits) - 1);
}

u32 group_of(u32 who) {
  return ((who & ~atomic_bit) >> thread_bits) - 1;
}

Mark mark_here(Space space, bool atomic, void* site) {
  u32 simd_epoch = g_simdgroups[g_current->simdgroup].epoch[space] & 0xffff;
  Mark mark;
  mark.who = group_key() | g_current->thread | (atomic ? atomic_bit : 0);
  mark.epoch = g_epoch[space] << 16 | simd_epoch;
  mark.site = (u32)((u64)site - g_launch.code_begin);
  return mark;
}

// Does `before` come before `now` in every run?
bool ordered(const Mark& before, const Mark& now) {
  if (id(before) == id(now)) {
    return true;
  }
  if (group_of(before.who) != group_of(now.who)) {
    return false;
  }
  if (before.epoch >> 16 != now.epoch >> 16) {
    return true;
  }
  bool same_simdgroup =
      thread_of(before.who) / simd_width == thread_of(now.who) / simd_width;
  return same_simdgroup && (before.epoch & 0xffff) != (now.epoch & 0xffff);
}

bool conflict(const Mark& before, const Mark& now) {
  bool both_atomic = before.who & now.who & atomic_bit;
  return before.who && !both_atomic && !ordered(before, now);
}

// Two unordered writes are reported once the second has been carried out:
// writing what is there already is a fault of its own, milder kind.
struct WaitingWrite {
  bool waiting;
  u64 address;
  u32 size, region;
  Mark before, now;
  Fiber* fiber;
  u8 old[64];
} g_waiting;

u64 code(u32 site) {
  return g_launch.code_begin + site;
}

void report_race(
    Kind kind,
    const char* what,
    const Mark& before,
    const Mark& now,
    u32 region,
    i64 offset,
    u32 size) {
  void* site = (void*)code(now.site);
  for (u32 i = 0; i < g_num_findings; ++i) {
    Finding& known = g_findings[i];
    if (known.kind == kind && known.site == (u64)site &&
        known.other_site == code(before.site)) {
      ++known.times;
      return;
    }
  }
  Finding* finding = find(kind, nullptr, "%s", what);
  if (finding) {
    finding->site = (u64)site;
    finding->other_site = code(before.site);
    finding->group = group_of(now.who);
    finding->thread = thread_of(now.who);
    finding->other_group = group_of(before.who);
    finding->other_thread = thread_of(before.who);
    finding->region = region;
    finding->offset = offset;
    finding->size = size;
  }
}

void write_after_write(
    u32 region,
    u64 address,
    u32 size,
    const Mark& before,
    const Mark& now) {
  // One access meets the same earlier write byte by byte.
  if (g_waiting.waiting && g_waiting.now.site == now.site &&
      g_waiting.fiber == g_current &&
      address - g_waiting.address < g_waiting.size) {
    return;
  }
  settle_write();
  g_waiting.waiting = true;
  g_waiting.address = address;
  g_waiting.size = size < sizeof g_waiting.old ? size : sizeof g_waiting.old;
  g_waiting.region = region;
  g_waiting.before = before;
  g_waiting.now = now;
  g_waiting.fiber = g_current;
  memcpy(g_waiting.old, (void*)address, g_waiting.size);
}

void mark_write(Cell& cell, const Mark& now) {
  cell.writer = now;
  cell.reader.who = cell.other_reader.who = 0;
}

void mark_read(Cell& cell, const Mark& now) {
  if (!cell.reader.who || ordered(cell.reader, now)) {
    cell.reader = now;
  } else {
    cell.other_reader = now;
  }
}

void check_cells(
    u32 index,
    Region& region,
    u64 address,
    u32 size,
    bool write,
    bool atomic,
    void* site) {
  Mark now = mark_here(region.space, atomic, site);
  Cell* cell = region.cells + (address - region.begin);
  for (u32 i = 0; i < size; ++i, ++cell) {
    i64 offset = address - region.begin + i;
    if (region.space == threadgroup && cell->writer.who &&
        group_of(cell->writer.who) != g_group) {
      *cell = Cell{}; // what an earlier threadgroup left there
    }
    if (conflict(cell->writer, now)) {
      if (write) {
        write_after_write(index, address + i, size - i, cell->writer, now);
      } else {
        report_race(
            Kind::race,
            "read after an unordered write",
            cell->writer,
            now,
            index,
            offset,
            size);
      }
    }
    if (write) {
      const Mark* reader = conflict(cell->reader, now) ? &cell->reader
          : conflict(cell->other_reader, now)          ? &cell->other_reader
                                                       : nullptr;
      if (reader) {
        report_race(
            Kind::race,
            "write after an unordered read",
            *reader,
            now,
            index,
            offset,
            size);
      }
      mark_write(*cell, now);
    } else {
      if (!cell->writer.who && !region.starts_written) {
        Finding* finding = find(
            Kind::uninitialised_read,
            site,
            "read of %u bytes never written",
            size);
        if (finding) {
          finding->region = index;
          finding->offset = offset;
          finding->size = size;
        }
      }
      mark_read(*cell, now);
    }
  }
}

bool known_memory(u64 address) {
  bool stack = address >= g_stacks_begin && address < g_stacks_end;
  bool code = address >= g_launch.code_begin && address < g_launch.code_end;
  return stack || code;
}

} // namespace

Finding* find(Kind kind, void* site, const char* format, ...) {
  for (u32 i = 0; site && i < g_num_findings; ++i) {
    if (g_findings[i].kind == kind && g_findings[i].site == (u64)site) {
      ++g_findings[i].times;
      return nullptr;
    }
  }
  if (g_num_findings == sizeof g_findings / sizeof *g_findings) {
    return nullptr;
  }
  Finding& finding = g_findings[g_num_findings++];
  memset(&finding, 0, sizeof finding);
  finding.kind = kind;
  finding.site = (u64)site;
  finding.group = g_group;
  finding.thread = g_current ? g_current->thread : 0;
  finding.times = 1;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(finding.text, sizeof finding.text, format, arguments);
  va_end(arguments);
  return &finding;
}

void settle_write() {
  if (!g_waiting.waiting) {
    return;
  }
  g_waiting.waiting = false;
  const Region& region = g_regions[g_waiting.region];
  bool same =
      memcmp((void*)g_waiting.address, g_waiting.old, g_waiting.size) == 0;
  report_race(
      same ? Kind::same_value_race : Kind::race,
      same ? "write of the same value after an unordered write"
           : "write after an unordered write",
      g_waiting.before,
      g_waiting.now,
      g_waiting.region,
      g_waiting.address - region.begin,
      g_waiting.size);
}

void check_access(
    Region& region,
    u64 address,
    u32 size,
    bool write,
    bool atomic,
    void* site) {
  u32 index = &region - g_regions;
  if (address < region.begin || address + size > region.end) {
    Finding* finding = region.begin
        ? find(
              Kind::out_of_bounds,
              site,
              "%s of %u bytes, the buffer has %llu",
              write ? "write" : "read",
              size,
              (unsigned long long)(region.end - region.begin))
        : find(
              Kind::out_of_bounds,
              site,
              "%s of %u bytes at %p, where no buffer lies",
              write ? "write" : "read",
              size,
              (void*)address);
    if (finding) {
      finding->region = region.begin ? index : 0;
      finding->offset = address - region.begin;
      finding->size = size;
    }
    stop_launch();
  }
  if (write && region.read_only) {
    Finding* finding = find(
        Kind::read_only_write, site, "write of %u bytes to an input", size);
    if (finding) {
      finding->region = index;
      finding->offset = address - region.begin;
      finding->size = size;
    }
    stop_launch();
  }
  if (region.cells) {
    check_cells(index, region, address, size, write, atomic, site);
  }
}

// An address outside of the arena: a lane's own variables, constants of the
// code, or a pointer gone astray.
void check_elsewhere(u64 address, u32 size, bool write, void* site) {
  if (known_memory(address)) {
    return;
  }
  const char* what = write ? "write" : "read";
  if (address < 1ull << 31) {
    find(
        Kind::unbound_buffer,
        site,
        "%s of %u bytes through a null pointer (%p)",
        what,
        size,
        (void*)address);
  } else {
    find(
        Kind::out_of_bounds,
        site,
        "%s of %u bytes at %p, where no buffer lies",
        what,
        size,
        (void*)address);
  }
  stop_launch();
}

void reset_checks() {
  g_num_findings = 0;
  g_waiting.waiting = false;
}

Cell* new_cells(u64 bytes) {
  return (Cell*)map_zeros(bytes * sizeof(Cell));
}

void free_cells(Cell* cells, u64 bytes) {
  unmap(cells, bytes * sizeof(Cell));
}

u64 first_unwritten(const Region& region) {
  for (u64 i = 0; i < region.end - region.begin; ++i) {
    if (!region.cells[i].writer.who) {
      return i;
    }
  }
  return ~0ull;
}

} // namespace workbench
