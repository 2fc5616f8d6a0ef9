# cmake -DNM= -DOBJDUMP= -DOBJECTS=a;b -DTABLE=symbol -P check_isa.cmake
# Fails on anything by which an object built for one instruction set could change code outside it: weak (COMDAT), unique
# or common symbols, globals other than the family's table, and code that runs at load time.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${OBJDUMP} -h ${object} OUTPUT_VARIABLE sections COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVuiC] [^\n]*" shared "${symbols}")
  string(REGEX MATCHALL "[^\n]* [TDBR] [^\n]*" globals "${symbols}")
  list(FILTER globals EXCLUDE REGEX " ${TABLE}$")
  string(REGEX MATCHALL "\\.(init_array|ctors)[^\n]*" initialisers "${sections}")
  if(shared OR globals OR initialisers)
    message(FATAL_ERROR "${object} leaks beyond its instruction set: ${shared} ${globals} ${initialisers}")
  endif()
endforeach()
