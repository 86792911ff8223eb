#include "cpu/pool.h"

#include <nanobind/stl/string.h>
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <fstream>
#include <sstream>
#include <thread>
#include <utility>

#include "bindings.h"
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

// How many of a machine's cores a process may use: a container often has less.
// `limit` is a cpu.max, microseconds in a period of them, or "max" first.
int processors(std::istream& limit, int cores) {
  double quota, period;
  if (limit >> quota >> period && period > 0) {
    return int(std::clamp(std::ceil(quota / period), 1.0, double(cores)));
  }
  return cores;
}

} // namespace

Pool& Pool::shared() {
  static Pool* pool = new Pool();
  return *pool;
}

Pool::Pool() {
  // Only the forking thread survives in a child: jobs run serially there.
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  std::ifstream limit("/sys/fs/cgroup/cpu.max");
  int cores = std::max(1u, std::thread::hardware_concurrency());
  set_threads(std::min(processors(limit, cores), most_threads));
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
  wake_.notify_all(); // or the surplus takes the wake-ups of the next jobs
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
    Function function,
    Clock now) {
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
  wait_for_workers(now);
  held_.store(false, std::memory_order_release);
}

void Pool::wait_for_workers(Clock now) {
  auto at_work = [this] { return state_.load(std::memory_order_acquire) != 0; };
  for (int spin = 0; spin < spins_before_sleep && at_work(); ++spin) {
    pause();
  }
  if (!at_work()) {
    return;
  }
  auto start = now();
  while (at_work()) {
    std::this_thread::yield();
  }
  if (now() - start > late) {
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

namespace {

// A job of Python functions, so that tests can hold its workers up and say by a
// clock, in microseconds, how long that took.
void run_pieces(
    int pieces,
    const nb::typed<nb::callable, void(int)>& work,
    const nb::typed<nb::callable, int()>& clock) {
  static thread_local const nb::callable* told;
  auto outer = std::exchange(told, &clock); // a piece may run pieces itself
  std::exception_ptr thrown; // as guarded as all of Python
  {
    nb::gil_scoped_release released;
    auto one = [&](int piece) {
      nb::gil_scoped_acquire held;
      try {
        work(piece);
      } catch (...) {
        thrown = std::current_exception();
      }
    };
    Pool::shared().run(pieces, one, Pool::most_threads, [] {
      nb::gil_scoped_acquire held;
      auto now = std::chrono::microseconds(nb::cast<int>((*told)()));
      return std::chrono::steady_clock::time_point(now);
    });
  }
  told = outer;
  if (thrown) {
    std::rethrow_exception(thrown);
  }
}

} // namespace

void bind_pool(nb::module_& m) {
  m.def("threads", [] { return Pool::shared().threads(); });
  m.def(
      "set_threads",
      [](int threads) { Pool::shared().set_threads(threads); },
      "threads"_a);

  // For tests
  m.def(
      "processors",
      [](const std::string& limit, int cores) {
        std::istringstream text(limit);
        return processors(text, cores);
      },
      "limit"_a,
      "cores"_a);
  m.def("run_pieces", &run_pieces, "pieces"_a, "work"_a, "clock"_a);
}

} // namespace pyengine
