// traffic: what the accesses of a launch cost.
//
// A GPU carries a load out for all lanes of a simdgroup at once. Here lanes run
// one after the other, so the k-th time that a lane reaches a place in the code
// is taken as its part of the k-th simd access there. Per simd access the
// distinct sectors and cache lines are counted: lanes that read the same bytes
// cost them once.

#include "runtime.h"

#include <string.h>

namespace workbench {

// What Python reads for each buffer. Bytes of sectors are sectors times 32.
struct Totals {
  u64 reads, writes, atomics; // by single lanes
  u64 read_bytes, written_bytes; // asked for by single lanes
  u64 simd_reads, simd_writes; // simd accesses
  u64 read_sectors, written_sectors; // distinct per simd access, summed
  u64 read_lines, written_lines; // the same in cache lines
  u64 group_read_sectors,
      group_written_sectors; // distinct per threadgroup, summed
  u64 distinct_read_sectors, distinct_written_sectors; // distinct in the launch
};

struct Traffic {
  Totals totals;
  u64 sectors;
  u32* read_by; // per sector: the last threadgroup + 1 that read it
  u32* written_by;
};

// What Python reads for each place in the code that touches a buffer.
struct SiteTotals {
  u64 site;
  u64 accesses, sectors, lines, bytes, lanes;
  u32 region, write;
};

namespace {

constexpr u64 sector_bytes = 32, line_bytes = 64;

// A simd access in the making.
struct Access {
  u64 site; // 0: empty
  u32 simdgroup, repetition;
  u32 num_sectors, num_lines;
  u64 sectors[2 * simd_width];
  u64 lines[2 * simd_width];
};

// How often a lane has been at a place.
struct Visits {
  u64 site;
  u32 thread, count;
};

// Open addressing; emptied after every threadgroup.
template <typename Entry>
struct Table {
  Entry* entries;
  u64 capacity, used;

  void clear() {
    if (used) {
      memset(entries, 0, capacity * sizeof(Entry));
      used = 0;
    }
  }

  template <typename Same>
  Entry& at(u64 hash, const Same& same) {
    u64 i = hash & (capacity - 1);
    while (entries[i].site && !same(entries[i])) {
      i = (i + 1) & (capacity - 1);
    }
    return entries[i];
  }

  template <typename Hash>
  void reserve(const Hash& hash_of) {
    if (2 * (used + 1) < capacity) {
      return;
    }
    Table old = *this;
    capacity = capacity ? 2 * capacity : 1024;
    entries = (Entry*)map_zeros(capacity * sizeof(Entry));
    for (u64 i = 0; i < old.capacity; ++i) {
      if (old.entries[i].site) {
        at(hash_of(old.entries[i]), [](const Entry&) { return false; }) =
            old.entries[i];
      }
    }
    if (old.entries) {
      unmap(old.entries, old.capacity * sizeof(Entry));
    }
  }
};

Table<Access> g_accesses;
Table<Visits> g_visits;
constexpr u32 max_sites = 4096;
SiteTotals g_sites[max_sites];
u32 g_num_sites;

u64 mix(u64 a, u64 b) {
  u64 h = a * 0x9e3779b97f4a7c15ull ^ b * 0xc2b2ae3d27d4eb4full;
  return h ^ h >> 29;
}

u64 hash_of(const Access& a) {
  return mix(a.site, (u64)a.simdgroup << 32 | a.repetition);
}

u64 hash_of(const Visits& v) {
  return mix(v.site, v.thread);
}

u32 visit(u64 site) {
  g_visits.reserve([](const Visits& v) { return hash_of(v); });
  u32 thread = g_current->thread;
  Visits& visits = g_visits.at(mix(site, thread), [=](const Visits& v) {
    return v.site == site && v.thread == thread;
  });
  if (!visits.site) {
    visits.site = site;
    visits.thread = thread;
    ++g_visits.used;
  }
  return visits.count++;
}

Access& access_at(u64 site, u32 repetition) {
  g_accesses.reserve([](const Access& a) { return hash_of(a); });
  u32 simdgroup = g_current->simdgroup;
  u64 hash = mix(site, (u64)simdgroup << 32 | repetition);
  return g_accesses.at(hash, [=](const Access& a) {
    return a.site == site && a.simdgroup == simdgroup &&
        a.repetition == repetition;
  });
}

SiteTotals* site_totals(u64 site, u32 region, bool write) {
  for (u32 i = 0; i < g_num_sites; ++i) {
    SiteTotals& known = g_sites[i];
    if (known.site == site && known.region == region && known.write == write) {
      return &known;
    }
  }
  if (g_num_sites == max_sites) {
    return nullptr;
  }
  SiteTotals& fresh = g_sites[g_num_sites++];
  fresh = SiteTotals{};
  fresh.site = site;
  fresh.region = region;
  fresh.write = write;
  return &fresh;
}

// How many of first..last are new to the list.
u32 add_new(u64* list, u32& length, u64 first, u64 last) {
  u32 added = 0;
  for (u64 value = first; value <= last; ++value) {
    u32 i = 0;
    while (i < length && list[i] != value) {
      ++i;
    }
    if (i == length && length < 2 * simd_width) {
      list[length++] = value;
      ++added;
    }
  }
  return added;
}

void count_sectors(Traffic& traffic, u64 offset, u32 size, bool write) {
  Totals& totals = traffic.totals;
  u32* last = write ? traffic.written_by : traffic.read_by;
  u64& in_group =
      write ? totals.group_written_sectors : totals.group_read_sectors;
  u64& in_launch =
      write ? totals.distinct_written_sectors : totals.distinct_read_sectors;
  for (u64 s = offset / sector_bytes; s <= (offset + size - 1) / sector_bytes;
       ++s) {
    in_launch += last[s] == 0;
    in_group += last[s] != g_group + 1;
    last[s] = g_group + 1;
  }
}

} // namespace

void count_access(
    Region& region,
    u64 address,
    u32 size,
    bool write,
    bool atomic,
    void* site) {
  Traffic& traffic = *region.traffic;
  Totals& totals = traffic.totals;
  (write ? totals.writes : totals.reads) += 1;
  (write ? totals.written_bytes : totals.read_bytes) += size;
  totals.atomics += atomic;
  count_sectors(traffic, address - region.begin, size, write);

  u32 repetition = visit((u64)site);
  Access& access = access_at((u64)site, repetition);
  bool first = !access.site;
  if (first) {
    access.site = (u64)site;
    access.simdgroup = g_current->simdgroup;
    access.repetition = repetition;
    ++g_accesses.used;
  }
  u32 sectors = add_new(
      access.sectors,
      access.num_sectors,
      address / sector_bytes,
      (address + size - 1) / sector_bytes);
  u32 lines = add_new(
      access.lines,
      access.num_lines,
      address / line_bytes,
      (address + size - 1) / line_bytes);
  (write ? totals.simd_writes : totals.simd_reads) += first;
  (write ? totals.written_sectors : totals.read_sectors) += sectors;
  (write ? totals.written_lines : totals.read_lines) += lines;
  if (SiteTotals* here = site_totals((u64)site, &region - g_regions, write)) {
    here->accesses += first;
    here->sectors += sectors;
    here->lines += lines;
    here->bytes += size;
    here->lanes += 1;
  }
}

void end_threadgroup_traffic() {
  g_accesses.clear();
  g_visits.clear();
}

void reset_traffic() {
  end_threadgroup_traffic();
  g_num_sites = 0;
}

Traffic* new_traffic(u64 bytes) {
  u64 sectors = bytes / sector_bytes + 1;
  Traffic* traffic = (Traffic*)map_zeros(sizeof(Traffic));
  traffic->sectors = sectors;
  traffic->read_by = (u32*)map_zeros(sectors * sizeof(u32));
  traffic->written_by = (u32*)map_zeros(sectors * sizeof(u32));
  return traffic;
}

void free_traffic(Traffic* traffic, u64) {
  unmap(traffic->read_by, traffic->sectors * sizeof(u32));
  unmap(traffic->written_by, traffic->sectors * sizeof(u32));
  unmap(traffic, sizeof(Traffic));
}

} // namespace workbench

using namespace workbench;

WB_EXPORT const Totals* workbench_totals(u32 slot) {
  Traffic* traffic = g_regions[1 + slot].traffic;
  return traffic ? &traffic->totals : nullptr;
}

WB_EXPORT const SiteTotals* workbench_sites(u32* count) {
  *count = g_num_sites;
  return g_sites;
}
