# tilewise_add_python_modules(<sources>): builds _C for each interpreter of TILEWISE_PYTHONS. pybind11 has no stable ABI,
# so a wheel for several interpreters holds one thin module each beside a single libtilewise.
function(tilewise_add_python_modules)
  set(pythons ${TILEWISE_PYTHONS})
  if(NOT pythons)
    find_package(Python COMPONENTS Interpreter REQUIRED)
    set(pythons ${Python_EXECUTABLE})
  endif()
  foreach(python IN LISTS pythons)
    execute_process(COMMAND ${python} -c
      "import sysconfig as s, pybind11 as p; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'), p.get_include(), sep=';', end='')"
      OUTPUT_VARIABLE facts COMMAND_ERROR_IS_FATAL ANY)
    list(POP_FRONT facts python_include suffix pybind11_include)
    string(MAKE_C_IDENTIFIER "_C${suffix}" module)
    add_library(${module} MODULE ${ARGN})
    target_include_directories(${module} PRIVATE ${CMAKE_SOURCE_DIR}/csrc ${CMAKE_BINARY_DIR}/generated)
    target_include_directories(${module} SYSTEM PRIVATE ${python_include} ${pybind11_include})
    target_compile_options(${module} PRIVATE -Wall -Wextra)
    target_link_libraries(${module} PRIVATE tilewise)
    set_target_properties(${module} PROPERTIES PREFIX "" OUTPUT_NAME "_C" SUFFIX "${suffix}"
      BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
    if(TILEWISE_INPLACE)
      set_target_properties(${module} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_SOURCE_DIR}/python/tilewise)
    endif()
    install(TARGETS ${module} LIBRARY DESTINATION tilewise)
  endforeach()
endfunction()
