// Taylor importance on the CPU: one read of the operands, at memory speed, the same bits for any thread count and ISA.
//
// The operands are views [units, reduce]. The work is cut into tasks whose shape depends on the matrix alone; each task
// leaves its sums in its own slot of a table of doubles, and one fixed loop adds the slots. Inside a task, float32 sums
// stay short (at most `kFlush` additions per lane) and are then added in double.
//
//   row tasks     a few rows times a piece of the reduction: dot products. Rows that are not contiguous are gathered
//                 into the same buffers first, so this also covers every odd layout.
//   column tasks  the units lie contiguously in memory: rows are added into a strip of sums.
//
// The kernels convert in registers, which needs one copy of them per pair of dtypes. The pairs that calibration meets
// have theirs (`fused`; float16's needs an instruction that not every processor has); every other mix, and every
// gathered layout, goes through float32 tiles in the L1 cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

#ifdef HYWIA_TARGET_CLONES
#include <immintrin.h>
#endif

namespace hywia {
namespace {

constexpr int64_t kLanes = 32;            // independent float32 sums of a row kernel
constexpr int64_t kTile = 1024;           // elements converted at once: 4 KiB per operand
constexpr int64_t kFlush = 32;            // float32 additions per sum before it is added in double
constexpr int64_t kTask = 1 << 19;        // elements per row task, about
constexpr int64_t kAhead = 512;           // bytes of each operand asked for before they are needed
constexpr int64_t kStrip = 2048;          // units of a column task: its float32 sums take half of an L1 cache
constexpr int64_t kColumnTask = 1 << 20;  // elements per column task, about: few tables of sums to add up
constexpr int64_t kColumnRows = 4;        // rows that a column task adds at once
constexpr int64_t kColumnTile = 128;      // columns of each that it converts at once, where it must
constexpr int64_t kNarrow = 32;           // fewer contiguous units than this: not worth a strip, gather instead
constexpr int64_t kGatherRows = 16;       // units gathered together, so that a cache line read once serves all of them
constexpr int64_t kGatherTile = 256;      // and elements of each of them

static_assert(kTile <= kLanes * kFlush, "a row tile must not outgrow the float32 sums");

// Tiles of n contiguous elements as float32. `ahead` is what will be converted next: asked for line by line, as this
// tile is read, so that memory is never idle and never asked for more than it has room to answer.
HYWIA_CLONES void bfloat16_tile(const uint16_t* source, int64_t n, float* tile, const uint16_t* ahead) {
    for (int64_t i = 0; i < n; i += kLanes) {
        __builtin_prefetch(ahead + i);
        for (int64_t j = i; j < std::min(n, i + kLanes); ++j) tile[j] = bfloat16_to_float(source[j]);
    }
}

#ifdef HYWIA_TARGET_CLONES
// The instruction for it, on processors of x86-64-v3 and later: three times the speed of the arithmetic below.
__attribute__((target("arch=x86-64-v3"))) void float16_tile(const uint16_t* source, int64_t n, float* tile,
                                                            const uint16_t* ahead) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        __builtin_prefetch(ahead + i);
        for (int64_t j = i; j < i + kLanes; j += 8)
            _mm256_storeu_ps(tile + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j))));
    }
    for (; i < n; ++i) tile[i] = _cvtsh_ss(source[i]);
}
__attribute__((target("default")))
#endif
void float16_tile(const uint16_t* source, int64_t n, float* tile, const uint16_t* ahead) {
    for (int64_t i = 0; i < n; i += kLanes) {
        __builtin_prefetch(ahead + i);
        for (int64_t j = i; j < std::min(n, i + kLanes); ++j) tile[j] = float16_to_float(source[j]);
    }
}

// `n` contiguous elements as float32, float32 itself in place; those at offset `next` will follow.
HYWIA_INLINE const float* contiguous_tile(const Operand& x, int64_t offset, int64_t next, int64_t n, float* buffer) {
    if (x.dtype == DType::Float32) {
        const float* source = static_cast<const float*>(x.data);
        for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(source + next + i);
        return source + offset;
    }
    const uint16_t *source = static_cast<const uint16_t*>(x.data) + offset,
                   *ahead = static_cast<const uint16_t*>(x.data) + next;
    x.dtype == DType::BFloat16 ? bfloat16_tile(source, n, buffer, ahead) : float16_tile(source, n, buffer, ahead);
    return buffer;
}

template <typename T, typename Convert>
void gather(const T* source, int64_t row_stride, int64_t stride, int64_t rows, int64_t n, float* tile,
            Convert convert) {
    if (row_stride < stride) {  // follow memory: the row index runs fastest
        for (int64_t i = 0; i < n; ++i)
            for (int64_t r = 0; r < rows; ++r) tile[r * n + i] = convert(source[r * row_stride + i * stride]);
    } else {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < n; ++i) tile[r * n + i] = convert(source[r * row_stride + i * stride]);
    }
}

// A [rows, n] piece of any layout as a dense float32 tile.
void gathered_tile(const Operand& x, int64_t offset, int64_t rows, int64_t n, float* tile) {
    const uint16_t* half = static_cast<const uint16_t*>(x.data) + offset;
    switch (x.dtype) {
        case DType::Float32:
            return gather(static_cast<const float*>(x.data) + offset, x.unit_stride, x.reduce_stride, rows, n, tile,
                          [](float v) { return v; });
        case DType::BFloat16:
            return gather(half, x.unit_stride, x.reduce_stride, rows, n, tile, bfloat16_to_float);
        case DType::Float16:
            return gather(half, x.unit_stride, x.reduce_stride, rows, n, tile, float16_to_float);
    }
}

template <DType dtype>
HYWIA_INLINE float load(const void* data, int64_t i) {
    static_assert(dtype != DType::Float16, "float16 goes through tiles: its conversion is a matter of instruction set");
    if constexpr (dtype == DType::Float32) return static_cast<const float*>(data)[i];
    if constexpr (dtype == DType::BFloat16) return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
}

// Asks for the kLanes elements from `i` on. The hardware's prefetchers stop at every 4 KiB page; this does not.
template <DType dtype>
HYWIA_INLINE void prefetch(const void* data, int64_t i) {
    const char* at = static_cast<const char*>(data) + i * element_size(dtype);
    for (int64_t line = 0; line < kLanes * element_size(dtype); line += 64) __builtin_prefetch(at + line);
}

// One term: the weight in dtype W, gradient and Fisher information in dtype S.
template <Order order, DType W, DType S>
HYWIA_INLINE float term(const void* weight, const void* grad, const void* fisher, int64_t i) {
    const float w = load<W>(weight, i);
    if constexpr (order == Order::First) return load<S>(grad, i) * w;
    if constexpr (order == Order::Second) return 0.5f * load<S>(fisher, i) * w * w;
    if constexpr (order == Order::Mixed) return load<S>(grad, i) * w - 0.5f * load<S>(fisher, i) * w * w;
}

struct Sums {
    double fine = 0, signed_sum = 0;
};

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

// A few rows of one operand, `pitch` elements apart.
struct Rows {
    const void* data = nullptr;
    int64_t pitch = 0;
};

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

using RowKernel = void (*)(Order, const void* w, const void* g, const void* f, int64_t n, Sums*);
using ColumnKernel = void (*)(Order, const Rows* wgf, int64_t rows, int64_t n, float* fine, float* signed_sum);

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

struct Kernels {
    RowKernel row = nullptr;
    ColumnKernel column = nullptr;
};

#ifdef HYWIA_TARGET_CLONES
// float16 in registers, by the instruction for it. Sums are made in the order in which tiles would make them.
#define HYWIA_F16C __attribute__((target("arch=x86-64-v3")))

HYWIA_F16C inline __m256 halves(const void* data, int64_t i) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + i)));
}

HYWIA_F16C inline float half(const void* data, int64_t i) { return _cvtsh_ss(static_cast<const uint16_t*>(data)[i]); }

template <Order order>
HYWIA_F16C inline __m256 half_terms(const void* w, const void* g, const void* f, int64_t i) {
    const __m256 weight = halves(w, i);
    if constexpr (order == Order::First) return _mm256_mul_ps(halves(g, i), weight);
    const __m256 second =
        _mm256_mul_ps(_mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), halves(f, i)), weight), weight);
    if constexpr (order == Order::Second) return second;
    return _mm256_sub_ps(_mm256_mul_ps(halves(g, i), weight), second);
}

template <Order order>
HYWIA_F16C inline float half_term(const void* w, const void* g, const void* f, int64_t i) {
    const float weight = half(w, i);
    if constexpr (order == Order::First) return half(g, i) * weight;
    const float second = 0.5f * half(f, i) * weight * weight;
    if constexpr (order == Order::Second) return second;
    return half(g, i) * weight - second;
}

HYWIA_F16C inline __m256 magnitudes(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

template <Order order>
HYWIA_F16C void half_row_sums(const void* w, const void* g, const void* f, int64_t n, Sums& sums) {
    constexpr int64_t ahead = kAhead / 2, vectors = kLanes / 8;
    for (int64_t at = 0; at < n; at += kTile) {
        __m256 fine[vectors], signed_sum[vectors];
        for (int64_t v = 0; v < vectors; ++v) fine[v] = signed_sum[v] = _mm256_setzero_ps();
        const int64_t end = std::min(n, at + kTile), whole = at + (end - at) / kLanes * kLanes;
        for (int64_t i = at; i < whole; i += kLanes) {
            prefetch<DType::Float16>(w, i + ahead);
            if constexpr (order != Order::Second) prefetch<DType::Float16>(g, i + ahead);
            if constexpr (order != Order::First) prefetch<DType::Float16>(f, i + ahead);
            for (int64_t v = 0; v < vectors; ++v) {
                const __m256 t = half_terms<order>(w, g, f, i + 8 * v);
                fine[v] = _mm256_add_ps(fine[v], magnitudes(t));
                signed_sum[v] = _mm256_add_ps(signed_sum[v], t);
            }
        }
        alignas(32) float lanes[2][kLanes];
        for (int64_t v = 0; v < vectors; ++v) {
            _mm256_store_ps(lanes[0] + 8 * v, fine[v]);
            _mm256_store_ps(lanes[1] + 8 * v, signed_sum[v]);
        }
        for (int64_t i = whole; i < end; ++i) {
            const float t = half_term<order>(w, g, f, i);
            lanes[0][i - whole] += std::fabs(t);
            lanes[1][i - whole] += t;
        }
        for (int64_t j = 0; j < kLanes; ++j) {
            sums.fine += lanes[0][j];
            sums.signed_sum += lanes[1][j];
        }
    }
}

template <Order order, int64_t rows>
HYWIA_F16C void half_column_sums(Rows w, Rows g, Rows f, int64_t n, float* __restrict fine,
                                 float* __restrict signed_sum) {
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        prefetch_rows<DType::Float16, rows>(w, i, n);
        if constexpr (order != Order::Second) prefetch_rows<DType::Float16, rows>(g, i, n);
        if constexpr (order != Order::First) prefetch_rows<DType::Float16, rows>(f, i, n);
        for (int64_t j = i; j < i + kLanes; j += 8) {
            __m256 sum = _mm256_loadu_ps(signed_sum + j), magnitude = _mm256_loadu_ps(fine + j);
            for (int64_t r = 0; r < rows; ++r) {
                const __m256 t = half_terms<order>(row<DType::Float16>(w, r), row<DType::Float16>(g, r),
                                                   row<DType::Float16>(f, r), j);
                sum = _mm256_add_ps(sum, t);
                magnitude = _mm256_add_ps(magnitude, magnitudes(t));
            }
            _mm256_storeu_ps(signed_sum + j, sum);
            _mm256_storeu_ps(fine + j, magnitude);
        }
    }
    for (int64_t i = whole; i < n; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
            const float t =
                half_term<order>(row<DType::Float16>(w, r), row<DType::Float16>(g, r), row<DType::Float16>(f, r), i);
            signed_sum[i] += t;
            fine[i] += std::fabs(t);
        }
    }
}

template <Order order>
HYWIA_F16C void half_column_rows(const Rows* wgf, int64_t rows, int64_t n, float* fine, float* signed_sum) {
    const Rows w = wgf[0], g = wgf[1], f = wgf[2];
    if (rows == kColumnRows) return half_column_sums<order, kColumnRows>(w, g, f, n, fine, signed_sum);
    const auto at = [](Rows x, int64_t r) { return Rows{row<DType::Float16>(x, r), x.pitch}; };
    for (int64_t r = 0; r < rows; ++r) half_column_sums<order, 1>(at(w, r), at(g, r), at(f, r), n, fine, signed_sum);
}

HYWIA_F16C void row_half(Order order, const void* w, const void* g, const void* f, int64_t n, Sums* sums) {
    if (order == Order::First) half_row_sums<Order::First>(w, g, f, n, *sums);
    if (order == Order::Second) half_row_sums<Order::Second>(w, g, f, n, *sums);
    if (order == Order::Mixed) half_row_sums<Order::Mixed>(w, g, f, n, *sums);
}

HYWIA_F16C void column_half(Order order, const Rows* wgf, int64_t rows, int64_t n, float* fine, float* signed_sum) {
    if (order == Order::First) half_column_rows<Order::First>(wgf, rows, n, fine, signed_sum);
    if (order == Order::Second) half_column_rows<Order::Second>(wgf, rows, n, fine, signed_sum);
    if (order == Order::Mixed) half_column_rows<Order::Mixed>(wgf, rows, n, fine, signed_sum);
}

HYWIA_F16C Kernels half_kernels() { return {row_half, column_half}; }
__attribute__((target("default")))
#endif
Kernels half_kernels() {
    return {};
}

// The kernels that read these operands as they are; null where there are none.
Kernels fused(const TaylorImportanceArgs& a) {
    const DType w = a.weight.dtype, s = a.grad.data ? a.grad.dtype : a.fisher.dtype;
    if (a.grad.data && a.fisher.data && a.grad.dtype != a.fisher.dtype) return {};
    if (w == DType::Float32 && s == DType::Float32) return {row_float32, column_float32};
    if (w == DType::BFloat16 && s == DType::BFloat16) return {row_bfloat16, column_bfloat16};
    if (w == DType::BFloat16 && s == DType::Float32) return {row_bfloat16_float32, column_bfloat16_float32};
    if (w == DType::Float16 && s == DType::Float16) return half_kernels();
    return {};
}

// Moves a strip's float32 sums into its doubles and clears them.
HYWIA_CLONES void flush(float* __restrict sums, int64_t n, double* __restrict total) {
    for (int64_t i = 0; i < n; ++i) {
        total[i] += sums[i];
        sums[i] = 0.0f;
    }
}

struct Buffers {
    alignas(64) float weight[kGatherRows * kGatherTile], grad[kGatherRows * kGatherTile],
        fisher[kGatherRows * kGatherTile];
};
static_assert(kTile <= kGatherRows * kGatherTile, "the buffers serve both kinds of tile");

const void* address(const Operand& x, int64_t unit, int64_t position) {
    const int64_t offset = unit * x.unit_stride + position * x.reduce_stride;
    return x.data ? static_cast<const char*>(x.data) + offset * element_size(x.dtype) : nullptr;
}

int64_t offset_of(const Operand& x, int64_t unit, int64_t position) {
    return unit * x.unit_stride + position * x.reduce_stride;
}

template <typename Predicate>
bool all_operands(const TaylorImportanceArgs& a, Predicate predicate) {
    for (const Operand* x : {&a.weight, &a.grad, &a.fisher})
        if (x->data && !predicate(*x)) return false;
    return true;
}

// One row, contiguous in every operand.
void contiguous_row(const TaylorImportanceArgs& a, RowKernel kernel, int64_t unit, int64_t begin, int64_t end,
                    Buffers& b, Sums& sums) {
    if (kernel) {
        const auto from = [&](const Operand& x) { return address(x, unit, begin); };
        return kernel(a.order, from(a.weight), from(a.grad), from(a.fisher), end - begin, &sums);
    }
    for (int64_t at = begin; at < end; at += kTile) {
        const int64_t n = std::min(kTile, end - at);
        const auto tile = [&](const Operand& x, float* buffer) {
            return x.data ? contiguous_tile(x, offset_of(x, unit, at), offset_of(x, unit, at + kTile), n, buffer)
                          : nullptr;
        };
        row_tile(a.order, tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher), n, &sums);
    }
}

// A few rows of any layout.
void gathered_rows(const TaylorImportanceArgs& a, int64_t unit, int64_t rows, int64_t begin, int64_t end, Buffers& b,
                   Sums* sums) {
    for (int64_t at = begin; at < end; at += kGatherTile) {
        const int64_t n = std::min(kGatherTile, end - at);
        const auto tile = [&](const Operand& x, float* buffer) {
            if (x.data) gathered_tile(x, offset_of(x, unit, at), rows, n, buffer);
        };
        tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher);
        for (int64_t r = 0; r < rows; ++r)
            row_tile(a.order, b.weight + r * n, b.grad + r * n, b.fisher + r * n, n, sums + r);
    }
}

void write(const TaylorImportanceArgs& a, int64_t unit, const Sums& sums) {
    a.fine[unit] = float(a.accumulate ? a.fine[unit] + sums.fine : sums.fine);
    a.signed_sum[unit] = float(a.accumulate ? a.signed_sum[unit] + sums.signed_sum : sums.signed_sum);
}

void by_rows(const TaylorImportanceArgs& a) {
    const bool contiguous = all_operands(a, [](const Operand& x) { return x.reduce_stride == 1; });
    const int64_t block = contiguous ? std::clamp(kTask / a.reduce, int64_t(1), int64_t(64)) : kGatherRows;
    const int64_t pieces = (a.reduce * (contiguous ? 1 : block) + kTask - 1) / kTask;
    const int64_t length = ((a.reduce + pieces - 1) / pieces + kTile - 1) / kTile * kTile;
    const int64_t blocks = (a.units + block - 1) / block;
    const int threads = useful_threads(a.threads, a.units * a.reduce);
    const RowKernel kernel = fused(a).row;
    std::vector<Sums> table(a.units * pieces);  // [pieces, units]
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t at = 0; at < blocks; ++at) {
            Buffers buffers;
            const int64_t unit = at * block, rows = std::min(block, a.units - unit);
            const int64_t begin = std::min(a.reduce, piece * length), end = std::min(a.reduce, begin + length);
            Sums* sums = table.data() + piece * a.units + unit;
            if (!contiguous)
                gathered_rows(a, unit, rows, begin, end, buffers, sums);
            else
                for (int64_t r = 0; r < rows; ++r) contiguous_row(a, kernel, unit + r, begin, end, buffers, sums[r]);
        }
    }
    for (int64_t unit = 0; unit < a.units / a.group_size; ++unit) {
        Sums total;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const Sums* sums = table.data() + piece * a.units + unit * a.group_size;
            for (int64_t r = 0; r < a.group_size; ++r) {
                total.fine += sums[r].fine;
                total.signed_sum += sums[r].signed_sum;
            }
        }
        write(a, unit, total);
    }
}

// Adds a few rows of up to kStrip units, converting a tile at a time.
void tiled_rows(const TaylorImportanceArgs& a, int64_t unit, int64_t width, int64_t at, int64_t rows, Buffers& b,
                float* fine, float* signed_sum) {
    for (int64_t first = 0; first < width; first += kColumnTile) {
        const int64_t n = std::min(kColumnTile, width - first);
        const auto tile = [&](const Operand& x, float* buffer) {
            Rows view;
            if (!x.data) return view;
            const int64_t next = first + kColumnTile < width ? first + kColumnTile : 0;
            for (int64_t r = rows - 1; r >= 0; --r)
                view.data =
                    contiguous_tile(x, offset_of(x, unit + first, at + r),
                                    offset_of(x, unit + next, at + r + (next ? 0 : rows)), n, buffer + r * kColumnTile);
            view.pitch = x.dtype == DType::Float32 ? x.reduce_stride : kColumnTile;
            return view;
        };
        const Rows operands[3] = {tile(a.weight, b.weight), tile(a.grad, b.grad), tile(a.fisher, b.fisher)};
        column_tile(a.order, operands, rows, n, fine + first, signed_sum + first);
    }
}

// Rows `begin` to `end` of the reduction for up to kStrip units.
void strip_task(const TaylorImportanceArgs& a, ColumnKernel kernel, int64_t unit, int64_t width, int64_t begin,
                int64_t end, double* fine, double* signed_sum) {
    Buffers b;
    float sums[2 * kStrip];
    std::fill(sums, sums + 2 * kStrip, 0.0f);
    for (int64_t at = begin, added = 0; at < end; at += kColumnRows) {
        const int64_t rows = std::min(kColumnRows, end - at);
        const auto from = [&](const Operand& x) { return Rows{address(x, unit, at), x.reduce_stride}; };
        const Rows operands[3] = {from(a.weight), from(a.grad), from(a.fisher)};
        if (kernel)
            kernel(a.order, operands, rows, width, sums, sums + kStrip);
        else
            tiled_rows(a, unit, width, at, rows, b, sums, sums + kStrip);
        added += rows;
        if (added == kFlush || at + rows == end) {
            flush(sums, width, fine);
            flush(sums + kStrip, width, signed_sum);
            added = 0;
        }
    }
}

void by_columns(const TaylorImportanceArgs& a) {
    const int64_t strips = (a.units + kStrip - 1) / kStrip;
    // A matrix of a small model is less than one task of the usual size: then an eighth of it, for threads to share.
    const int64_t eighth = ((a.reduce + 7) / 8 + kFlush - 1) / kFlush * kFlush;
    const int64_t length = std::max(kFlush, std::min(eighth, kColumnTask / std::min(a.units, kStrip)));
    const int64_t pieces = (a.reduce + length - 1) / length;
    const int threads = useful_threads(a.threads, a.units * a.reduce);
    const ColumnKernel kernel = fused(a).column;
    std::vector<double> table(2 * pieces * a.units);  // [pieces, fine and signed, units]
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t unit = strip * kStrip, begin = piece * length;
            double* fine = table.data() + 2 * piece * a.units + unit;
            strip_task(a, kernel, unit, std::min(kStrip, a.units - unit), begin, std::min(a.reduce, begin + length),
                       fine, fine + a.units);
        }
    }
    for (int64_t piece = 1; piece < pieces; ++piece)
        for (int64_t i = 0; i < 2 * a.units; ++i) table[i] += table[2 * piece * a.units + i];
    for (int64_t unit = 0; unit < a.units / a.group_size; ++unit) {
        Sums total;
        for (int64_t i = unit * a.group_size; i < (unit + 1) * a.group_size; ++i) {
            total.fine += table[i];
            total.signed_sum += table[a.units + i];
        }
        write(a, unit, total);
    }
}

}  // namespace

void taylor_importance_cpu(const TaylorImportanceArgs& args) {
    TaylorImportanceArgs a = args;
    for (Operand* x : {&a.weight, &a.grad, &a.fisher}) {  // the stride of a dimension of size one means nothing
        if (a.reduce == 1) x->reduce_stride = 1;
        if (a.units == 1) x->unit_stride = 1;
    }
    if (a.units == 0) return;
    if (a.reduce == 0) {
        for (int64_t unit = 0; unit < a.units / a.group_size; ++unit) write(a, unit, Sums{});
        return;
    }
    const bool rows = all_operands(a, [](const Operand& x) { return x.reduce_stride == 1; });
    const bool columns = all_operands(a, [](const Operand& x) { return x.unit_stride == 1; });
    if (columns && a.units >= kNarrow && (!rows || a.reduce == 1))
        by_columns(a);
    else
        by_rows(a);
}

}  // namespace hywia
