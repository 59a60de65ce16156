// Every CUDA kernel of attention. Raw pointers only: this source also runs on the CPU in the tests.
#pragma once

#include "scale_attention/kernel_plain.cuh"
