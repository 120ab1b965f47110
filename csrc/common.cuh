// What the CUDA kernels share: checked calls, dtype conversions, 16-byte loads, reductions in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace hywia {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                                 cudaGetErrorString(status));
    }
}
#define HYWIA_CHECK_CUDA(call) ::hywia::check_cuda((call), #call)

inline int multiprocessors() {
    int device = 0, count = 0;
    HYWIA_CHECK_CUDA(cudaGetDevice(&device));
    HYWIA_CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An element type known only at run time: the one instantiation that covers what the fast paths do not.
struct AnyType {};

template <typename T>
__device__ __forceinline__ float to_float(T value) {
    return static_cast<float>(value);
}

// `count` consecutive elements in registers. Full vectors are read as 16-byte words that bypass L1 (read once).
template <typename T, int count>
struct Vector {
    static_assert(count * sizeof(T) % 16 == 0, "vectors are read in 16-byte words");
    static constexpr int kWords = count * sizeof(T) / 16;
    uint4 word[kWords];

    __device__ __forceinline__ void load(const void* base, int64_t offset, DType) {
        const uint4* source = reinterpret_cast<const uint4*>(static_cast<const T*>(base) + offset);
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = __ldcs(source + i);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ float get(int i, DType) const {
        T value;  // by memcpy: an element read through a pointer of another type would be undefined
        memcpy(&value, reinterpret_cast<const char*>(word) + i * sizeof(T), sizeof value);
        return to_float(value);
    }
};

// One element whose type is known at run time. The loads are predicated, not branched over, so that several of them
// are in flight at once; the conversion waits until `get`.
template <>
struct Vector<AnyType, 1> {
    uint32_t bits;

    __device__ __forceinline__ void load(const void* base, int64_t offset, DType dtype) {
        bits = dtype == DType::Float32 ? __ldcs(static_cast<const unsigned int*>(base) + offset)
                                       : __ldcs(static_cast<const unsigned short*>(base) + offset);
    }
    __device__ __forceinline__ void clear() { bits = 0; }
    __device__ __forceinline__ float get(int, DType dtype) const {
        const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
        return dtype == DType::Float16 ? half : __uint_as_float(dtype == DType::BFloat16 ? bits << 16 : bits);
    }
};

// An operand that this order does not have: no registers, no loads.
template <int count>
struct Vector<void, count> {
    static constexpr int kWords = 0;
    __device__ __forceinline__ void load(const void*, int64_t, DType) {}
    __device__ __forceinline__ void clear() {}
    __device__ __forceinline__ float get(int, DType) const { return 0.0f; }
};

// Sum over the lanes of a warp whose index differs in the bits from `low` up to (not including) `high`: powers of two.
// A butterfly: every lane ends with the same bits.
__device__ __forceinline__ float warp_sum(float value, int low, int high) {
    for (int mask = low; mask < high; mask *= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
    return value;
}

}  // namespace hywia
