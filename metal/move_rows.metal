// move_rows: keys and values of the rows of a tree that are kept, to the places
// that plain steps would have given them.
//
// One thread per 4 bytes of a head's line, whatever the dtype, in the keys and
// in the values; it moves those of all rows, one after the other, since a row's
// old place may be an earlier one's new place. No other thread has these bytes.
// A row that stands where it belongs is left out: of a chain nothing moves.
#include "common.h"
#include "positions.h"

namespace pyengine {

[[host_name(
    "move_rows")]] [[kernel, max_total_threads_per_threadgroup(256)]] void
move_rows(
    const device int* rows [[buffer(0)]], // [Q, A]
    const device int* lengths [[buffer(1)]], // [Q]
    const device int* tables [[buffer(2)]], // [Q, N]
    const device int* kept [[buffer(3)]], // [Q]
    device uint* keys [[buffer(4)]], // [P, K, 64, words]
    device uint* values [[buffer(5)]], // [P, K, 64, words]
    constant uint& P [[buffer(6)]],
    constant uint& K [[buffer(7)]],
    constant uint& Q [[buffer(8)]],
    constant uint& N [[buffer(9)]],
    constant uint& A [[buffer(10)]],
    constant uint& words [[buffer(11)]], // of a head's line
    uint2 at [[thread_position_in_grid]]) {
  uint head = at.x / words, word = at.x % words, s = at.y;
  if (head >= K) {
    return;
  }
  int length = lengths[s];
  int count = min(int(A), kept[s]);
  for (int j = 0; j < count; ++j) {
    int row = rows[ulong(s) * A + j];
    int to = page_behind(tables, Q, N, P, s, length, j);
    int from = page_behind(tables, Q, N, P, s, length, row);
    if (to < 0 || from < 0 || row == j) {
      continue;
    }
    ulong target =
        (ulong(to) * K + head) * page_size + (length + j) % page_size;
    ulong source =
        (ulong(from) * K + head) * page_size + (length + row) % page_size;
    keys[target * words + word] = keys[source * words + word];
    values[target * words + word] = values[source * words + word];
  }
}

} // namespace pyengine
