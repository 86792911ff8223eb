#include "mapped.h"

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace pyengine {

namespace {

// What the handler looks through, so a table without locks. A bundle of the
// largest model has some 1,500 tensors that are worth a map.
struct Region {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
};

constexpr int most_regions = 1 << 14;
Region regions[most_regions];
std::mutex changing; // held by whoever enters a region or takes one out
std::atomic<size_t> bytes{0};
std::atomic<bool> lost{false};
struct sigaction before;
uintptr_t page;

Region* region_of(uintptr_t at) {
  for (auto& region : regions) {
    if (region.begin <= at && at < region.end) {
      return &region;
    }
  }
  return nullptr;
}

// The rest of a map whose file ends becomes zeros, and what read there goes
// on. A fault elsewhere is whose it was before.
void on_bus_error(int, siginfo_t* info, void*) {
  int error = errno;
  auto at = reinterpret_cast<uintptr_t>(info->si_addr) / page * page;
  auto* region = region_of(at);
  void* zeros = MAP_FAILED;
  if (region != nullptr) {
    zeros = mmap(
        reinterpret_cast<void*>(at),
        region->end - at,
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
        -1,
        0);
  }
  if (zeros == MAP_FAILED) {
    sigaction(SIGBUS, &before, nullptr);
  } else {
    lost = true;
  }
  errno = error;
}

void handle_bus_errors() {
  static std::once_flag once;
  std::call_once(once, [] {
    page = sysconf(_SC_PAGESIZE);
    struct sigaction own{};
    own.sa_sigaction = on_bus_error;
    own.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&own.sa_mask);
    sigaction(SIGBUS, &own, &before);
  });
}

Region* enter(uintptr_t begin, uintptr_t end) {
  std::lock_guard lock(changing);
  for (auto& region : regions) {
    if (region.end == 0) {
      region.begin = begin;
      region.end = end;
      bytes += end - begin;
      return &region;
    }
  }
  return nullptr;
}

void leave(Region* region) {
  std::lock_guard lock(changing);
  uintptr_t begin = region->begin, end = region->end;
  munmap(reinterpret_cast<void*>(begin), end - begin);
  region->end = 0;
  bytes -= end - begin;
}

// MLX's allocator for processors keeps the size in front of the data.
constexpr size_t size_word = sizeof(size_t);

} // namespace

bool can_map() {
#ifdef __linux__
  static const bool can = [] {
    auto probe = mx::allocator::malloc(4 * size_word);
    auto buffer = probe.buffer();
    size_t size = 0;
    std::memcpy(&size, buffer.ptr(), size_word);
    return mx::default_device() == mx::Device::cpu &&
        !mx::is_available(mx::Device::gpu) && size == 4 * size_word &&
        buffer.raw_ptr() == static_cast<char*>(buffer.ptr()) + size_word;
  }();
  return can;
#else
  return false;
#endif
}

std::optional<mx::array>
map_tensor(int file, size_t begin, mx::Shape shape, mx::Dtype dtype) {
  size_t size = mx::size_of(dtype);
  for (auto n : shape) {
    size *= n;
  }
  struct stat known{};
  if (fstat(file, &known) != 0 ||
      begin + size > static_cast<size_t>(known.st_size)) {
    throw std::invalid_argument("the file is cut off");
  }
  if (!can_map() || size == 0 || begin < size_word ||
      begin % mx::size_of(dtype) != 0) {
    return std::nullopt;
  }
  handle_bus_errors();
  // Each tensor has a map of its own, so the word in front of it is its too
  size_t first = (begin - size_word) / page * page;
  size_t length = begin + size - first;
  void* base = mmap(
      nullptr,
      length,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_NORESERVE,
      file,
      first);
  if (base == MAP_FAILED) {
    return std::nullopt;
  }
  auto at = reinterpret_cast<uintptr_t>(base);
  auto* region = enter(at, at + length);
  if (region == nullptr) {
    munmap(base, length);
    return std::nullopt;
  }
  char* word = static_cast<char*>(base) + (begin - size_word - first);
  std::memcpy(word, &size, size_word);
  mx::allocator::Data data(
      mx::allocator::Buffer(word),
      [region](mx::allocator::Buffer) { leave(region); });
  return mx::array(std::move(data), std::move(shape), dtype);
}

bool read_mapped(const mx::array& a, size_t begin, size_t size) {
  if (begin + size > a.nbytes()) {
    throw std::invalid_argument("no such bytes");
  }
  if (bytes == 0 || size == 0 || !a.is_available()) {
    return false;
  }
  auto at = reinterpret_cast<uintptr_t>(a.data<char>()) + begin;
  if (region_of(at) == nullptr) {
    return false;
  }
  uintptr_t first = at / page * page;
#ifdef MADV_POPULATE_READ
  // Fills the page tables too, and fails where a page cannot be read
  if (madvise(
          reinterpret_cast<void*>(first),
          at + size - first,
          MADV_POPULATE_READ) == 0) {
    return true;
  }
  if (errno != EINVAL) { // of kernels before 5.14
    throw std::runtime_error(std::strerror(errno));
  }
#endif
  for (uintptr_t p = at; p < at + size; p = p / page * page + page) {
    (void)*reinterpret_cast<const volatile char*>(p);
  }
  return true;
}

size_t mapped_bytes() {
  return bytes;
}

bool lost_mapped() {
  return lost;
}

void bind_mapped(nb::module_& m) {
  m.def("can_map", &can_map);
  m.def(
      "map_tensor",
      [](int file,
         size_t begin,
         const std::vector<mx::ShapeElem>& shape,
         mx::Dtype dtype) {
        return map_tensor(
            file, begin, mx::Shape(shape.begin(), shape.end()), dtype);
      },
      "file"_a,
      "begin"_a,
      "shape"_a,
      "dtype"_a);
  m.def(
      "read_mapped",
      &read_mapped,
      "a"_a,
      "begin"_a,
      "size"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def("mapped_bytes", &mapped_bytes);
  m.def("lost_mapped", &lost_mapped);
}

} // namespace pyengine
