#pragma once
// pool.h: threads that share the pieces of one kernel.
//
// A kernel's work is cut into pieces by its launch plan, never by the number of
// threads; the pool only decides who runs which piece, so bits cannot depend on
// it. A forward pass starts a job every few microseconds, hence idle workers
// spin a little before they sleep and a job allocates nothing.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace pyengine {

class Pool {
 public:
  static constexpr int most_threads = 256;
  using Clock = std::chrono::steady_clock::time_point (*)();

  // One pool per process; it is never destroyed, so no thread is joined while
  // the interpreter exits.
  static Pool& shared();

  int threads() const {
    return threads_.load(std::memory_order_relaxed);
  }

  // Threads per job, the caller included. For tests and benches.
  void set_threads(int threads);

  // Whether a worker kept a caller waiting not long ago, as one does that the
  // system puts aside in the middle of its piece: small jobs then do better
  // alone. Every call counts as one of them.
  bool was_late() {
    int left = alone_.load(std::memory_order_relaxed);
    if (left > 0) {
      alone_.store(left - 1, std::memory_order_relaxed);
    }
    return left > 0;
  }

  // Calls work(piece) once for each piece in [0, pieces), on at most so many
  // threads; returns when all are done. `work` must not throw. If another
  // stream holds the pool, or in a forked child, the caller runs all pieces
  // itself. `now` tells how long workers keep it waiting.
  template <typename Work>
  void run(
      int pieces,
      const Work& work,
      int most = most_threads,
      Clock now = std::chrono::steady_clock::now) {
    most = std::min({most, pieces, threads()});
    if (most <= 1 || !acquire()) {
      for (int piece = 0; piece < pieces; ++piece) {
        work(piece);
      }
      return;
    }
    auto one = [](const void* context, int piece) {
      (*static_cast<const Work*>(context))(piece);
    };
    share(pieces, most - 1, &work, one, now);
  }

 private:
  using Function = void (*)(const void* context, int piece);

  Pool();
  bool acquire();
  void share(
      int pieces,
      int helpers,
      const void* context,
      Function function,
      Clock now);
  void take_pieces();
  void wait_for_workers(Clock now);
  void work_forever(int index);
  bool join();
  void grow(int workers);

  std::atomic<int> threads_{1};
  int workers_ = 0; // started so far; guarded by held_

  // The current job. Written by the caller between acquire() and opening.
  Function function_ = nullptr;
  const void* context_ = nullptr;
  int pieces_ = 0;
  std::atomic<int> helpers_{0}; // workers that may join it

  // Workers inside the job, plus `open` while more may join.
  static constexpr uint32_t open = 1u << 31;
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<bool> held_{false};

  std::atomic<int> alone_{0}; // small jobs to do without workers

  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_; // a job is open
  std::condition_variable raised_; // more threads may work
};

} // namespace pyengine
