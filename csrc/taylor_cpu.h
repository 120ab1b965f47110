// What the files of taylor_importance_cpu share: its kernels, by which a few rows are added up, and what they promise.
#pragma once

#include <algorithm>

#include "common.h"

namespace hywia::taylor {

constexpr int64_t kLanes = 32;      // independent float32 sums of a row kernel
constexpr int64_t kTile = 1024;     // elements converted at once: 4 KiB per operand
constexpr int64_t kFlush = 32;      // float32 additions per sum before it is added in double
constexpr int64_t kAhead = 512;     // bytes of each operand asked for before they are needed
constexpr int64_t kColumnRows = 4;  // rows that a column task adds at once

static_assert(kTile <= kLanes * kFlush, "a row tile must not outgrow the float32 sums");

struct Sums {
    double fine = 0, signed_sum = 0;
};

// A few rows of one operand, `pitch` elements apart.
struct Rows {
    const void* data = nullptr;
    int64_t pitch = 0;
};

using RowKernel = void (*)(Order, const void* w, const void* g, const void* f, int64_t n, Sums*);
using ColumnKernel = void (*)(Order, const Rows* wgf, int64_t rows, int64_t n, float* fine, float* signed_sum);

struct Kernels {
    RowKernel row = nullptr;
    ColumnKernel column = nullptr;
};

// The kernels that read these operands as they are; null where there are none.
Kernels fused(const TaylorImportanceArgs& args);
Kernels half_kernels();  // float16, where the processor has an instruction that converts it
Kernels tile_kernels();  // float32 that lies in the L1 cache

// Asks for the kLanes elements from `i` on. The hardware's prefetchers stop at every 4 KiB page; this does not.
template <DType dtype>
HYWIA_INLINE void prefetch(const void* data, int64_t i) {
    const char* at = static_cast<const char*>(data) + i * element_size(dtype);
    for (int64_t line = 0; line < kLanes * element_size(dtype); line += 64) __builtin_prefetch(at + line);
}

template <DType dtype>
HYWIA_INLINE const void* row(Rows x, int64_t r) {
    return static_cast<const char*>(x.data) + r * x.pitch * element_size(dtype);
}

// Asks for what comes kAhead bytes later: at the end of these rows, the beginning of the next ones.
template <DType dtype, int64_t rows>
HYWIA_INLINE void prefetch_rows(Rows x, int64_t i, int64_t n) {
    int64_t at = i + kAhead / element_size(dtype);
    if (at >= n) at += rows * x.pitch - n;
    for (int64_t r = 0; r < rows; ++r) prefetch<dtype>(row<dtype>(x, r), at);
}

}  // namespace hywia::taylor
