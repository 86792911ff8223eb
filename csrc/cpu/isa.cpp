#include "cpu/isa.h"

#include <atomic>

#include "check.h"

#if defined(PYENGINE_HAS_amx) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyengine {

namespace {

#if defined(PYENGINE_HAS_amx)
// Whether tiles of bytes may be used. Linux keeps a thread's 8 KB of tiles
// only for processes that ask.
bool has_amx() {
#if defined(PYENGINE_EMULATE_TILES)
  return true;
#elif defined(__linux__)
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  unsigned a, b, c, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if ((d & tile) == 0 || (d & int8) == 0) {
    return false;
  }
  constexpr int ask_for_state = 0x1023, tile_data = 18; // asm/prctl.h
  return syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<std::string> runnable_sets() {
#if defined(PYENGINE_HAS_avx2)
  std::vector<std::string> names = {"portable"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.push_back("avx2");
#if defined(PYENGINE_HAS_amx) // and those before: none is built alone
    if (__builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      names.push_back("avx512");
      if (__builtin_cpu_supports("avx512vbmi") &&
          __builtin_cpu_supports("avx512vnni")) {
        names.push_back("vnni");
        if (has_amx()) {
          names.push_back("amx");
        }
      }
    }
#endif
  }
  return names;
#elif defined(PYENGINE_HAS_neon)
  return {"neon"};
#else
  return {"portable"};
#endif
}

std::atomic<int>& chosen() {
  static std::atomic<int> index{int(instruction_sets().size()) - 1};
  return index;
}

} // namespace

const std::vector<std::string>& instruction_sets() {
  static const std::vector<std::string> names = runnable_sets();
  return names;
}

int instruction_set() {
  return chosen().load(std::memory_order_relaxed);
}

void use_instruction_set(const std::string& name) {
  const auto& names = instruction_sets();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) {
      chosen().store(int(i));
      return;
    }
  }
  std::string rule = "be one of";
  for (const auto& known : names) {
    rule += " " + known;
  }
  fail("use", "instruction set", rule, name);
}

} // namespace pyengine
