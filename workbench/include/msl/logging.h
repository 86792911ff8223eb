#pragma once
// logging: os_log, which says nothing here.

namespace metal {

struct os_log {
  template <class A, class B>
  constexpr os_log(A, B) {}
  template <class... A>
  void log_debug(A...) const {}
  template <class... A>
  void log_info(A...) const {}
  template <class... A>
  void log_error(A...) const {}
};

} // namespace metal
