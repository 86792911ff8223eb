#include "cpu/isa.h"

#include <atomic>

#include "check.h"

namespace pyengine {

namespace {

std::vector<std::string> runnable_sets() {
#if defined(PYENGINE_HAS_avx2)
  std::vector<std::string> names = {"portable"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.push_back("avx2");
#if defined(PYENGINE_HAS_avx512)
    if (__builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      names.push_back("avx512");
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
