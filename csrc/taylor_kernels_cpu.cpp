// Kernels of taylor_importance_cpu that convert in registers: one read of the operands, at memory speed.
#include <cmath>

#include "taylor_cpu.h"

namespace hywia::taylor {
namespace {

template <DType dtype>
HYWIA_INLINE float load(const void* data, int64_t i) {
    static_assert(dtype != DType::Float16, "float16 goes through tiles: its conversion is a matter of instruction set");
    if constexpr (dtype == DType::Float32) return static_cast<const float*>(data)[i];
    if constexpr (dtype == DType::BFloat16) return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
}

// One term: the weight in dtype W, gradient and Fisher information in dtype S.
template <Order order, DType W, DType S>
HYWIA_INLINE float term(const void* weight, const void* grad, const void* fisher, int64_t i) {
    const float w = load<W>(weight, i);
    if constexpr (order == Order::First) return load<S>(grad, i) * w;
    if constexpr (order == Order::Second) return 0.5f * load<S>(fisher, i) * w * w;
    if constexpr (order == Order::Mixed) return load<S>(grad, i) * w - 0.5f * load<S>(fisher, i) * w * w;
}

// Sums of n contiguous terms. Lane j always takes the elements j, j + 32, ..., is moved into its double every kTile
// elements, and the lanes are always added in the same order, whatever the width of the vector unit.
template <Order order, DType W, DType S, bool memory>
HYWIA_INLINE void row_sums(const void* w, const void* g, const void* f, int64_t n, Sums& sums) {
    constexpr int64_t ahead_w = kAhead / element_size(W), ahead_s = kAhead / element_size(S);
    double fine[kLanes] = {}, signed_sum[kLanes] = {};
    for (int64_t at = 0; at < n; at += kTile) {
        float tile_fine[kLanes] = {}, tile_signed[kLanes] = {};
        const int64_t end = std::min(n, at + kTile), whole = at + (end - at) / kLanes * kLanes;
        for (int64_t i = at; i < whole; i += kLanes) {
            if constexpr (memory) prefetch<W>(w, i + ahead_w);
            if constexpr (memory && order != Order::Second) prefetch<S>(g, i + ahead_s);
            if constexpr (memory && order != Order::First) prefetch<S>(f, i + ahead_s);
            for (int64_t j = 0; j < kLanes; ++j) {
                const float t = term<order, W, S>(w, g, f, i + j);
                tile_fine[j] += std::fabs(t);
                tile_signed[j] += t;
            }
        }
        for (int64_t i = whole; i < end; ++i) {
            const float t = term<order, W, S>(w, g, f, i);
            tile_fine[i - whole] += std::fabs(t);
            tile_signed[i - whole] += t;
        }
        for (int64_t j = 0; j < kLanes; ++j) {
            fine[j] += tile_fine[j];
            signed_sum[j] += tile_signed[j];
        }
    }
    for (int64_t j = 0; j < kLanes; ++j) {
        sums.fine += fine[j];
        sums.signed_sum += signed_sum[j];
    }
}

// Adds `rows` rows of n terms to n sums: a sum is loaded and stored once for all of them.
template <Order order, DType W, DType S, bool memory, int64_t rows>
HYWIA_INLINE void column_sums(Rows w, Rows g, Rows f, int64_t n, float* __restrict fine, float* __restrict signed_sum) {
    const auto add = [&](int64_t i) __attribute__((always_inline)) {
        float sum = signed_sum[i], magnitude = fine[i];
        for (int64_t r = 0; r < rows; ++r) {
            const float t = term<order, W, S>(row<W>(w, r), row<S>(g, r), row<S>(f, r), i);
            sum += t;
            magnitude += std::fabs(t);
        }
        signed_sum[i] = sum;
        fine[i] = magnitude;
    };
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        if constexpr (memory) prefetch_rows<W, rows>(w, i, n);
        if constexpr (memory && order != Order::Second) prefetch_rows<S, rows>(g, i, n);
        if constexpr (memory && order != Order::First) prefetch_rows<S, rows>(f, i, n);
        for (int64_t j = 0; j < kLanes; ++j) add(i + j);
    }
    for (int64_t i = whole; i < n; ++i) add(i);
}

template <Order order, DType W, DType S, bool memory>
HYWIA_INLINE void column_rows(Rows w, Rows g, Rows f, int64_t rows, int64_t n, float* fine, float* signed_sum) {
    if (rows == kColumnRows) return column_sums<order, W, S, memory, kColumnRows>(w, g, f, n, fine, signed_sum);
    for (int64_t r = 0; r < rows; ++r)
        column_sums<order, W, S, memory, 1>({row<W>(w, r), w.pitch}, {row<S>(g, r), g.pitch}, {row<S>(f, r), f.pitch},
                                            n, fine, signed_sum);
}

// Templates cannot be cloned per instruction set, hence functions of its own for each pair of dtypes, and for tiles.
#define HYWIA_KERNELS(NAME, W, S, MEMORY)                                                                           \
    HYWIA_CLONES void row_##NAME(Order order, const void* w, const void* g, const void* f, int64_t n, Sums* sums) { \
        if (order == Order::First) row_sums<Order::First, W, S, MEMORY>(w, g, f, n, *sums);                         \
        if (order == Order::Second) row_sums<Order::Second, W, S, MEMORY>(w, g, f, n, *sums);                       \
        if (order == Order::Mixed) row_sums<Order::Mixed, W, S, MEMORY>(w, g, f, n, *sums);                         \
    }                                                                                                               \
    HYWIA_CLONES void column_##NAME(Order order, const Rows* wgf, int64_t rows, int64_t n, float* fine,             \
                                    float* signed_sum) {                                                            \
        const Rows w = wgf[0], g = wgf[1], f = wgf[2];                                                              \
        if (order == Order::First) column_rows<Order::First, W, S, MEMORY>(w, g, f, rows, n, fine, signed_sum);     \
        if (order == Order::Second) column_rows<Order::Second, W, S, MEMORY>(w, g, f, rows, n, fine, signed_sum);   \
        if (order == Order::Mixed) column_rows<Order::Mixed, W, S, MEMORY>(w, g, f, rows, n, fine, signed_sum);     \
    }

HYWIA_KERNELS(float32, DType::Float32, DType::Float32, true)
HYWIA_KERNELS(bfloat16, DType::BFloat16, DType::BFloat16, true)
HYWIA_KERNELS(bfloat16_float32, DType::BFloat16, DType::Float32, true)
HYWIA_KERNELS(tile, DType::Float32, DType::Float32, false)
#undef HYWIA_KERNELS

}  // namespace

Kernels tile_kernels() { return {row_tile, column_tile}; }

Kernels fused(const TaylorImportanceArgs& a) {
    const DType w = a.weight.dtype, s = a.grad.data ? a.grad.dtype : a.fisher.dtype;
    if (a.grad.data && a.fisher.data && a.grad.dtype != a.fisher.dtype) return {};
    if (w == DType::Float32 && s == DType::Float32) return {row_float32, column_float32};
    if (w == DType::BFloat16 && s == DType::BFloat16) return {row_bfloat16, column_bfloat16};
    if (w == DType::BFloat16 && s == DType::Float32) return {row_bfloat16_float32, column_bfloat16_float32};
    if (w == DType::Float16 && s == DType::Float16) return half_kernels();
    return {};
}

}  // namespace hywia::taylor
