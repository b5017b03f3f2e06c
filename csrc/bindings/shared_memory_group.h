// What core.cpp needs of shared_memory.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace fastagg::bindings {

void define_shared_memory(pybind11::module_& m);

}  // namespace fastagg::bindings
