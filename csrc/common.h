// What the CPU kernels share: dtype conversions that vectorise, instruction-set clones, thread choice.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

// GCC compiles a function marked HYWIA_CLONES once per instruction set and picks at load time, so that one binary runs
// everywhere and is fast on each machine. CMake tests whether the toolchain can; otherwise the plain function stays.
// Results do not depend on the clone: fixed lane counts, and no contraction to fused multiply-adds (-ffp-contract=off).
#ifdef HYWIA_TARGET_CLONES
#define HYWIA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HYWIA_CLONES
#endif
#define HYWIA_INLINE inline __attribute__((always_inline))

namespace hywia {

HYWIA_INLINE float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

HYWIA_INLINE float bfloat16_to_float(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }

// Integer arithmetic and selects only, so that loops over it vectorise. Subnormals go through a subtraction of two
// normal numbers, which is exact and does not depend on the flush-to-zero mode of the thread.
HYWIA_INLINE float float16_to_float(uint16_t bits) {
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    const uint32_t exponent = magnitude & 0x0f800000;
    const float tiny = bits_to_float(magnitude | 0x38800000) - bits_to_float(0x38800000);  // 0x38800000 is 2^-14
    uint32_t tiny_bits;
    std::memcpy(&tiny_bits, &tiny, sizeof tiny_bits);
    const uint32_t rebias = exponent == 0x0f800000 ? 0x70000000 : 0x38000000;  // infinity and NaN: all exponent bits
    const uint32_t result = exponent == 0 ? tiny_bits : magnitude + rebias;
    return bits_to_float(result | uint32_t(bits & 0x8000) << 16);
}

HYWIA_INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Rounded to nearest, ties to even. NaN stays NaN: its rounding could carry into the exponent, so a bit is set instead.
HYWIA_INLINE uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// The same for float16. Below 2^-14 a sum with 0.5 leaves the rounded subnormal in its low bits: 0.5's last is 2^-24.
HYWIA_INLINE uint16_t float_to_float16(float value) {
    const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
    const uint32_t tiny = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t finite = magnitude < 0x38800000 ? tiny : normal;
    const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or what rounds to infinity
    return uint16_t((magnitude >= 0x477ff000 ? large : finite) | (bits >> 16 & 0x8000));
}

constexpr int64_t element_size(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

// Below this many elements a second thread costs more than it brings.
inline int useful_threads(int threads, int64_t elements) {
    constexpr int64_t worth_a_thread = 16384;
    const int64_t most = elements / worth_a_thread + 1;
    return threads < 1 ? 1 : int(threads < most ? threads : most);
}

}  // namespace hywia
