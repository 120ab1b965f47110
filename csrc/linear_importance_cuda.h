// What the launcher of linear_importance knows of its kernels, which are compiled in files of their own.
#pragma once

#include <cuda.h>  // CUtensorMap; no function of the driver is linked

#include "common.cuh"
#include "linear_plan.h"

namespace hywia {

struct LinearKernelArgs {
    const int32_t* offsets;  // [samples + 1], or null: `length` tokens each
    int samples, length, tokens;
    LinearPlan plan;
    float scale, mean_scale, square_scale;  // of G_s, of their sum, of the sum of their squares
    float* partial;                         // tables as LinearPlan says
};

// One compiled kernel: (tensor map of the operand whose columns are the units, of the other operand, of the weight,
// LinearKernelArgs).
struct LinearKernel {
    const void* function;
    int threads;
    uint32_t shared_bytes;
    int index;  // a small number of its own
};
constexpr int kLinearKernels = 4 * 2 * kLinearModes;  // two dtypes, rows and columns; equal and ragged samples

// `ragged`: the samples' limits are read from memory. `columns`: units are the weight's columns.
const LinearKernel& linear_kernel_bfloat16(LinearMode mode, bool ragged, bool columns);
const LinearKernel& linear_kernel_float16(LinearMode mode, bool ragged, bool columns);

}  // namespace hywia
