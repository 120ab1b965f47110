// Kernels of taylor_importance_cpu for float16, by the instruction that converts it. Sums are made in the order in
// which tiles would make them.
#include <cmath>

#include "taylor_cpu.h"

#ifdef HYWIA_TARGET_CLONES
#include <immintrin.h>
#endif

namespace hywia::taylor {

#ifdef HYWIA_TARGET_CLONES
namespace {

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

HYWIA_F16C Kernels half_here() { return {row_half, column_half}; }
__attribute__((target("default"))) Kernels half_here() { return {}; }

}  // namespace

Kernels half_kernels() { return half_here(); }
#else
Kernels half_kernels() { return {}; }
#endif

}  // namespace hywia::taylor
