// Which instruction set's loops run. Chosen once: FASTAGG_ISA if set, else the best that the processor has.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fastagg {

/// The loops in use. Throws std::invalid_argument if FASTAGG_ISA names none that this processor has.
const Kernels& kernels();

/// Names of the instruction sets that this build and this processor have, best first.
std::vector<std::string> available_isas();

/// Uses the loops of one instruction set from now on. Throws std::invalid_argument for a name not available.
void force_isa(const std::string& name);

}  // namespace fastagg
