#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <thread>

#include "check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyengine {

namespace {

// About 20 microseconds: longer than the gap between two ops of a forward
// pass, short enough not to matter to whoever else uses the machine.
constexpr int spins_before_sleep = 400;

// A small job's longest piece takes a few tens of microseconds, and the system
// brings back a thread that it has put aside after milliseconds.
constexpr auto late = std::chrono::microseconds(200);

// So many small jobs are some thirty rounds of a small model: time lost by
// trying again is a few percent of theirs.
constexpr int jobs_alone_after_late = 1 << 12;

std::atomic<bool> forked{false};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");
#endif
}

// What this process may use: a container often has less than its machine.
int processors() {
  int count = std::max(1u, std::thread::hardware_concurrency());
  std::ifstream limit("/sys/fs/cgroup/cpu.max"); // or its first word is "max"
  double quota, period;
  if (limit >> quota >> period && period > 0) {
    count = std::clamp(int(std::ceil(quota / period)), 1, count);
  }
  return count;
}

} // namespace

Pool& Pool::shared() {
  static Pool* pool = new Pool();
  return *pool;
}

Pool::Pool() {
  // Only the forking thread survives in a child: jobs run serially there.
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  set_threads(std::min(processors(), most_threads));
}

void Pool::set_threads(int threads) {
  check(
      threads >= 1 && threads <= most_threads,
      "use",
      "threads",
      "be between 1 and 256",
      threads);
  std::lock_guard<std::mutex> lock(mutex_);
  threads_.store(threads);
  raised_.notify_all();
}

bool Pool::acquire() {
  return !forked.load(std::memory_order_relaxed) &&
      !held_.exchange(true, std::memory_order_acquire);
}

void Pool::grow(int workers) {
  for (; workers_ < workers; ++workers_) {
    std::thread(&Pool::work_forever, this, workers_ + 1).detach();
  }
}

void Pool::share(
    int pieces,
    int helpers,
    const void* context,
    Function function) {
  grow(helpers);
  helpers_.store(helpers, std::memory_order_relaxed);
  function_ = function;
  context_ = context;
  pieces_ = pieces;
  next_.store(0, std::memory_order_relaxed);

  // Sequentially consistent, as is the sleepers' side: either this thread sees
  // a sleeper, or the sleeper sees the open job.
  state_.store(open);
  if (int asleep = std::min(sleepers_.load(), helpers); asleep > 0) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    for (int i = 0; i < asleep; ++i) {
      wake_.notify_one();
    }
  }

  take_pieces();

  // A worker that has not joined by now finds the job closed.
  state_.fetch_and(~open, std::memory_order_acq_rel);
  wait_for_workers();
  held_.store(false, std::memory_order_release);
}

void Pool::wait_for_workers() {
  auto at_work = [this] { return state_.load(std::memory_order_acquire) != 0; };
  for (int spin = 0; spin < spins_before_sleep && at_work(); ++spin) {
    pause();
  }
  if (!at_work()) {
    return;
  }
  auto start = std::chrono::steady_clock::now();
  while (at_work()) {
    std::this_thread::yield();
  }
  if (std::chrono::steady_clock::now() - start > late) {
    alone_.store(jobs_alone_after_late, std::memory_order_relaxed);
  }
}

void Pool::take_pieces() {
  for (;;) {
    int piece = next_.fetch_add(1, std::memory_order_relaxed);
    if (piece >= pieces_) {
      return;
    }
    function_(context_, piece);
  }
}

bool Pool::join() {
  uint32_t state = state_.load(std::memory_order_acquire);
  while (state & open) {
    if (int(state & ~open) >= helpers_.load(std::memory_order_relaxed)) {
      return false;
    }
    if (state_.compare_exchange_weak(
            state, state + 1, std::memory_order_acq_rel)) {
      return true;
    }
  }
  return false;
}

void Pool::work_forever(int index) {
  for (;;) {
    if (index >= threads()) {
      // Surplus since set_threads: must not wake with every job.
      std::unique_lock<std::mutex> lock(mutex_);
      raised_.wait(lock, [this, index] { return index < threads(); });
    }
    for (int spin = 0; spin < spins_before_sleep; ++spin) {
      if (join()) {
        take_pieces();
        // None is left. Were the job still open, this worker would join it
        // again and again, and take the line of `state_` from the others.
        state_.fetch_and(~open, std::memory_order_relaxed);
        state_.fetch_sub(1, std::memory_order_acq_rel);
        spin = 0;
      }
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [this, index] {
      return (state_.load() & open) != 0 || index >= threads();
    });
    sleepers_.fetch_sub(1);
  }
}

} // namespace pyengine
