# One source, compiled once per CPU instruction set and kept apart from all other code.
# tilewise_add_isa_objects(<target> <family> <folder>) adds the objects of <folder>/kernels.cpp to <target>, and those of
# <folder>/amx.cpp for the kernels of a family that have a version for AMX tiles.

set(TILEWISE_ISAS "" CACHE STRING "Instruction sets to build the CPU kernels for; default: all of this processor family")
set(isas generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND isas avx2 avx512 amx)
  set(TILEWISE_FLAGS_generic -march=x86-64)
  set(TILEWISE_FLAGS_avx2 -mavx2 -mfma -mbmi2 -mf16c -mprefer-vector-width=256)
  set(TILEWISE_FLAGS_avx512 -mavx2 -mfma -mbmi2 -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq
      -mprefer-vector-width=512)
  # Its blocks are long chains of arithmetic, two of them side by side: worth scheduling before registers are allocated.
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    set(TILEWISE_FLAGS_optim_avx2 -fschedule-insns -fsched-pressure -mtune=haswell)
    set(TILEWISE_FLAGS_optim_avx512 -fschedule-insns -fsched-pressure -mtune=icelake-server)
  endif()
  set(TILEWISE_FLAGS_amx ${TILEWISE_FLAGS_avx512} -mavx512bf16 -mavx512vnni -mavx512vbmi2 -mgfni
      -mamx-tile -mamx-bf16 -mamx-int8)
endif()
if(NOT TILEWISE_ISAS)
  set(TILEWISE_ISAS ${isas})
endif()

function(tilewise_add_isa_objects target family folder)
  set(isas ${TILEWISE_ISAS})
  if(NOT EXISTS ${CMAKE_SOURCE_DIR}/${folder}/amx.cpp)
    list(REMOVE_ITEM isas amx)
  endif()
  foreach(isa IN LISTS isas)
    set(source ${folder}/kernels.cpp)
    if(isa STREQUAL amx)
      set(source ${folder}/amx.cpp)
    endif()
    set(objects ${target}_${family}_${isa})
    add_library(${objects} OBJECT ${source})
    target_include_directories(${objects} PRIVATE ${CMAKE_SOURCE_DIR}/csrc ${CMAKE_SOURCE_DIR}/include)
    target_compile_definitions(${objects} PRIVATE TILEWISE_ISA=${isa})
    target_compile_options(${objects} PRIVATE ${TILEWISE_FLAGS_${isa}} ${TILEWISE_FLAGS_${family}_${isa}} -O3 -Wall -nostdinc++ -fno-exceptions -fno-rtti
      -fno-threadsafe-statics -fno-asynchronous-unwind-tables -fno-math-errno -fno-trapping-math -ffp-contract=fast
      -Wno-psabi -Wno-unused-function
      -Wno-uninitialized -Wno-maybe-uninitialized)  # false: GCC's own intrinsics headers
    set_target_properties(${objects} PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF CXX_EXTENSIONS ON)
    # Fails the build if the object could leak code of its instruction set into the rest of the program.
    set(stamp ${CMAKE_BINARY_DIR}/isa/${objects}.checked)
    add_custom_command(OUTPUT ${stamp} VERBATIM DEPENDS $<TARGET_OBJECTS:${objects}>
      ${CMAKE_SOURCE_DIR}/cmake/check_isa.cmake
      COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DOBJDUMP=${CMAKE_OBJDUMP} -DOBJECTS=$<TARGET_OBJECTS:${objects}>
        -DTABLE=tilewise_${family}_${isa} -P ${CMAKE_SOURCE_DIR}/cmake/check_isa.cmake
      COMMAND ${CMAKE_COMMAND} -E touch ${stamp})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}> ${stamp})
  endforeach()
endfunction()
