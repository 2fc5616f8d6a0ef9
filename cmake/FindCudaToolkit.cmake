# Finds nvcc: CUDACXX or PATH first, then the pinned toolkit wheels (nvidia-cuda-nvcc and friends) of the building
# Python, else the build is CPU-only. Sets TILEWISE_HAS_CUDA and prints one line that says which.
include(CheckLanguage)

# CMAKE_PREFIX_PATH and the interpreter's site-packages: where pip put the toolkit wheels.
function(tilewise_find_toolkit_wheels result)
  find_package(Python COMPONENTS Interpreter QUIET)
  if(NOT Python_FOUND)
    return()
  endif()
  execute_process(COMMAND ${Python_EXECUTABLE} -c
    "import sys, pathlib; print(next((str(r) for p in sys.path for r in [pathlib.Path(p) / 'nvidia' / 'cu13'] if (r / 'bin' / 'nvcc').exists()), ''), end='')"
    OUTPUT_VARIABLE root)
  set(${result} "${root}" PARENT_SCOPE)
endfunction()

set(TILEWISE_HAS_CUDA OFF)
if(TILEWISE_CUDA STREQUAL "OFF")
  message(STATUS "tilewise: CPU-only build (TILEWISE_CUDA=OFF)")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 80-virtual)
endif()
find_program(nvcc_on_path nvcc NO_CMAKE_SYSTEM_PATH)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND NOT nvcc_on_path)
  tilewise_find_toolkit_wheels(wheels)
  if(wheels)
    set(CMAKE_CUDA_COMPILER ${wheels}/bin/nvcc)
    set(CMAKE_CUDA_FLAGS_INIT "-L${wheels}/lib")  # the wheels keep the libraries in lib, not in lib64
  endif()
endif()
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  set(TILEWISE_HAS_CUDA ON)
  message(STATUS "tilewise: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
elseif(TILEWISE_CUDA STREQUAL "ON")
  message(FATAL_ERROR "tilewise: TILEWISE_CUDA=ON, but no nvcc on PATH, in CUDACXX or in the Python environment")
else()
  message(STATUS "tilewise: CPU-only build (no nvcc on PATH, in CUDACXX or in the Python environment)")
endif()
