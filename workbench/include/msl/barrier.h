#pragma once
// barrier: barriers and fences.

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
};
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}

enum memory_order : int {
  memory_order_relaxed = 0,
  memory_order_acquire = 2,
  memory_order_release = 3,
  memory_order_acq_rel = 4,
  memory_order_seq_cst = 5,
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
};

MSL_INLINE void threadgroup_barrier(mem_flags flags) {
  workbench_threadgroup_barrier((uint)flags);
}
MSL_INLINE void
threadgroup_barrier(mem_flags flags, memory_order, thread_scope) {
  workbench_threadgroup_barrier((uint)flags);
}
MSL_INLINE void simdgroup_barrier(mem_flags flags) {
  workbench_simdgroup_barrier((uint)flags);
}
// Lanes run one at a time, so a fence has nothing to do; it orders nothing in
// the checks either.
MSL_INLINE void atomic_thread_fence(
    mem_flags,
    memory_order,
    thread_scope = thread_scope_device) {}

} // namespace metal
