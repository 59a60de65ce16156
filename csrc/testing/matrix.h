// Internal to the emulation: the matrix operations of a warp (warp.cpp calls them).
#pragma once

#include "testing/scheduler.h"

namespace flexvar::emulation {

void complete_matrix_load(const WarpGroup& group, unsigned warp);
void complete_matrix_product(const WarpGroup& group);

}  // namespace flexvar::emulation
