// What the launcher of linear_importance knows of its kernels, which are compiled in files of their own.
#pragma once

#include <cuda.h>  // CUtensorMap; no function of the driver is linked

#include "common.cuh"

namespace hywia {

constexpr int kLinearFineRows = 3;     // first, second, mixed
constexpr int kLinearStepTokens = 64;  // tokens of one stage

// How one call is cut; depends on the sizes and the device alone.
struct LinearPlan {
    int cluster_m = 1, cluster_n = 1;  // blocks of a cluster along m (units) and n (the other dimension)
    int m_tiles = 0, n_tiles = 0;      // of a whole cluster
    int clusters = 0;                  // each with `run` consecutive tiles, n fastest; the last with fewer
    int run = 0;
    int segments = 0;        // most clusters that share one m tile
    int64_t rows = 0;        // quantities: fine sums, then signed sums
    int64_t row_stride = 0;  // units, padded to whole tiles
};

struct LinearKernelArgs {
    const int32_t* offsets;  // [samples + 1], or null: `length` tokens each
    int samples, length, tokens;
    LinearPlan plan;
    float scale, mean_scale, square_scale;  // of G_s, of their sum, of the sum of their squares
    float* partial;                         // [segments · cluster_n, rows, row_stride]
};

enum class LinearVariant : int { Whole = 0, Samples = 1, Squares = 2 };

// One compiled kernel: (tensor map of the operand whose columns are the units, of the other operand, of the weight,
// LinearKernelArgs).
struct LinearKernel {
    const void* function;
    int tile_m, tile_n, cluster_m, cluster_n, threads;
    uint32_t shared_bytes;
    int index[3];  // of dtype, variant and axis: a small number for each kernel
};

const LinearKernel& linear_kernel_bfloat16(LinearVariant variant, bool columns);
const LinearKernel& linear_kernel_float16(LinearVariant variant, bool columns);

}  // namespace hywia
