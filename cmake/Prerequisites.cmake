# Finds what the build needs, and says in one sentence what is missing.
set(PYENGINE_MLX_VERSION "0.32.4")

include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR
    "pyengine needs a C++20 compiler: install g++ 11 or later "
    "(Debian, Ubuntu: apt install g++) or Apple's command line tools "
    "(xcode-select --install).")
endif()
enable_language(CXX)

# Only Development.Module: asking for SABIModule would give the extension a
# stable-ABI nanobind key, and MLX's arrays would not be recognised.
find_package(Python 3.10 COMPONENTS Interpreter Development.Module QUIET)
if(NOT Python_Development.Module_FOUND)
  message(FATAL_ERROR
    "pyengine needs the headers of Python 3.10 or later "
    "(Debian, Ubuntu: apt install python3-dev).")
endif()

# Not `import mlx.core`: that would load libmlx, which a build needs no more
# than its headers.
function(pyengine_locate variable package suffix)
  if(NOT ${variable})
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import importlib.util as u; print(list(u.find_spec('${package}').submodule_search_locations)[0])"
      OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(found)
      set(${variable} "${found}${suffix}" PARENT_SCOPE)
    endif()
  endif()
endfunction()

pyengine_locate(nanobind_ROOT nanobind /cmake)
find_package(nanobind CONFIG QUIET)
if(NOT nanobind_FOUND)
  message(FATAL_ERROR
    "pyengine needs nanobind in this Python: pip install nanobind==3.1.0.")
endif()

pyengine_locate(MLX_ROOT mlx "")
find_package(MLX ${PYENGINE_MLX_VERSION} EXACT CONFIG QUIET)
if(NOT MLX_FOUND)
  message(FATAL_ERROR
    "pyengine needs mlx ${PYENGINE_MLX_VERSION} exactly, with its headers: "
    "pip install \"mlx[cpu]==${PYENGINE_MLX_VERSION}\" (Linux) or "
    "pip install mlx==${PYENGINE_MLX_VERSION} (macOS).")
endif()
