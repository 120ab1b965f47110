// What the launcher of linear_importance knows of its kernels, which are compiled in files of their own.
#pragma once

#include <cuda.h>  // CUtensorMap; no function of the driver is linked

#include "common.cuh"

namespace hywia {

constexpr int kLinearFineRows = 3;     // first, second, mixed
constexpr int kLinearStepTokens = 64;  // tokens of one stage

// How one call is cut; depends on the sizes and the device alone.
//
// `across` clusters side by side have an m tile each and stay with it; `share` clusters divide the n tiles of one m
// tile and keep separate sums. When a group of `across` m tiles is done, all go on to the next. What is being worked on
// at one time is therefore a compact block of the weight, and its operands stay in L2.
struct LinearPlan {
    int cluster_m = 1, cluster_n = 1;  // blocks of a cluster along m (units) and n (the other dimension)
    int m_tiles = 0, n_tiles = 0;      // of a whole cluster
    int across = 1, share = 1;         // clusters
    int groups = 0;                    // of m tiles
    int64_t rows = 0;                  // quantities: fine sums, then signed sums
    int64_t first_signed = 0;          // row of the first signed sum
    int signed_slots = 1;              // tables that hold parts of the signed sums
    int64_t row_stride = 0;            // units, padded to whole tiles
};

struct LinearKernelArgs {
    const int32_t* offsets;  // [samples + 1], or null: `length` tokens each
    int samples, length, tokens;
    LinearPlan plan;
    float scale, mean_scale, square_scale;  // of G_s, of their sum, of the sum of their squares
    float* partial;                         // [share · cluster_n, rows, row_stride]
};

// Which kernel. Whole: the mean gradient in one product, no sample told from the next. Samples: one product per sample,
// for signed sums of each. Squares: the sum of squares too. Fine: that without signed sums, which come from elsewhere.
enum class LinearMode : int { Whole = 0, Samples = 1, Squares = 2, Fine = 3 };

// One compiled kernel: (tensor map of the operand whose columns are the units, of the other operand, of the weight,
// LinearKernelArgs).
struct LinearKernel {
    const void* function;
    int tile_m, tile_n, cluster_m, cluster_n, threads;
    uint32_t shared_bytes;
    int index;  // a small number of its own
};
constexpr int kLinearKernels = 28;

// `ragged`: the samples' limits are read from memory. `columns`: units are the weight's columns.
const LinearKernel& linear_kernel_bfloat16(LinearMode mode, bool ragged, bool columns);
const LinearKernel& linear_kernel_float16(LinearMode mode, bool ragged, bool columns);

}  // namespace hywia
