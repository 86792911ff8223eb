# Which instruction sets the processor kernels are compiled for, and how.
#
# PYENGINE_INSTRUCTION_SETS  names, slowest first; also C++ namespaces
# PYENGINE_FLAGS_<name>      compiler flags
# PYENGINE_ISA_DEFINITIONS   what csrc/cpu/kernel.h and isa.cpp ask for
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
if(CMAKE_OSX_ARCHITECTURES)
  string(TOLOWER "${CMAKE_OSX_ARCHITECTURES}" processor)
endif()

if(processor MATCHES "^(x86_64|amd64)$")
  set(PYENGINE_INSTRUCTION_SETS portable avx2 avx512 vnni amx)
  if(PYENGINE_SANITIZE) # avx512 has its tails from the same code as avx2
    set(PYENGINE_INSTRUCTION_SETS portable avx2)
  endif()
  set(PYENGINE_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(PYENGINE_FLAGS_avx512
    -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set(PYENGINE_FLAGS_vnni
    ${PYENGINE_FLAGS_avx512} -mavx512vbmi -mavx512vnni)
  set(PYENGINE_FLAGS_amx ${PYENGINE_FLAGS_vnni} -mamx-tile -mamx-int8)
  # For .ci/tiles.sh, on processors that lack nothing else; slow
  option(PYENGINE_EMULATE_TILES "Emulate the tile instructions of amx" OFF)
  if(PYENGINE_EMULATE_TILES)
    set(PYENGINE_FLAGS_amx ${PYENGINE_FLAGS_vnni} -DPYENGINE_EMULATE_TILES)
    list(APPEND PYENGINE_ISA_DEFINITIONS PYENGINE_EMULATE_TILES)
  endif()
elseif(processor MATCHES "^(arm64|aarch64)$")
  set(PYENGINE_INSTRUCTION_SETS neon)
else()
  set(PYENGINE_INSTRUCTION_SETS portable)
endif()

foreach(isa IN LISTS PYENGINE_INSTRUCTION_SETS)
  list(APPEND PYENGINE_ISA_DEFINITIONS PYENGINE_HAS_${isa})
endforeach()
