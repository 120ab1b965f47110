// compact on the GPU: moves 2- and 4-byte elements, or 16-byte words of kept rows, without looking at their values.
#include <algorithm>

#include "common.cuh"

namespace hywia {
namespace {

constexpr int kThreads = 256;
constexpr int kTileWords = 2048;  // 32 KiB: six blocks per SM, so that some copy while others pack
constexpr int kStripRows = 16;

__device__ __forceinline__ void copy_async(uint4* to, const uint4* from) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// out[i] = weight[keep[i]], whole rows of `words` words. One flat index over the words of `out` balances any shape;
// its division is why the index type is 32-bit whenever that reaches.
template <typename Word, typename Index>
__global__ void __launch_bounds__(kThreads)
    copy_rows(const CompactArgs a, Index words, Index total, int64_t row_stride, int64_t word_stride) {
    constexpr int kUnroll = 4;
    const Word* source = static_cast<const Word*>(a.weight);
    const Index first = Index(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
    Word value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const Index at = first + u * kThreads;
        if (at < total) {
            const Index row = at / words;
            value[u] = __ldcs(source + a.keep[row] * row_stride + int64_t(at - row * words) * word_stride);
        }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const Index at = first + u * kThreads;
        if (at < total) __stcs(static_cast<Word*>(a.out) + at, value[u]);
    }
}

template <typename Word>
void launch_rows(const CompactArgs& a, int64_t words, int64_t row_stride, int64_t word_stride) {
    const int64_t total = a.rows * words, blocks = divide_up(total, kThreads * 4);
    if (blocks > 0x7fffffff) throw std::runtime_error("weight: too many elements for one launch of the cuda backend");
    const cudaStream_t stream = static_cast<cudaStream_t>(a.stream);
    if (blocks * kThreads * 4 <= 0xffffffff) {
        copy_rows<Word, uint32_t>
            <<<unsigned(blocks), kThreads, 0, stream>>>(a, uint32_t(words), uint32_t(total), row_stride, word_stride);
    } else {
        copy_rows<Word, uint64_t><<<unsigned(blocks), kThreads, 0, stream>>>(a, words, total, row_stride, word_stride);
    }
}

// out[:, i] = weight[:, keep[i]]. A thread keeps one column and walks down a piece of the rows, so `keep` is read once
// per piece; neighbouring threads write neighbouring elements and, `keep` being increasing, read nearly so.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4) gather_columns(const CompactArgs a, int64_t strips, int64_t length) {
    constexpr int kUnroll = 16;
    const int64_t column = blockIdx.x % strips * kThreads + threadIdx.x;
    const int64_t begin = blockIdx.x / strips * length, end = min(a.rows, begin + length);
    if (column >= a.columns) return;
    const Word* source = static_cast<const Word*>(a.weight) + a.keep[column] * a.column_stride + begin * a.row_stride;
    Word* out = static_cast<Word*>(a.out) + column + begin * a.columns;
    int64_t left = end - begin;
    for (; left >= kUnroll; left -= kUnroll) {
        Word value[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u, source += a.row_stride) value[u] = __ldcs(source);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u, out += a.columns) __stcs(out, value[u]);
    }
    for (; left > 0; --left, source += a.row_stride, out += a.columns) *out = *source;
}

// out[:, i] = weight[:, keep[i]] where rows can be read in 16-byte words. `keep` increases, so a block's outputs come
// from one span of each row: the span goes to shared memory as it lies (most of its sectors hold a survivor, and all of
// its lines are read once), and is packed from there, so that no 2-byte access goes through L1. A span that shared
// memory does not hold has few survivors and is gathered one by one.
template <typename Word, int kWide>
__global__ void __launch_bounds__(kThreads, 6) pack_columns(const CompactArgs a, int64_t strips) {
    struct alignas(kWide * sizeof(Word)) Pack {
        Word value[kWide];
    };
    constexpr int kPerWord = 16 / sizeof(Word);
    __shared__ uint4 tile[kTileWords];
    const int64_t left = blockIdx.x % strips * (kThreads * kWide);
    const int64_t right = min(a.columns, left + kThreads * kWide);
    const int64_t column = left + threadIdx.x * kWide;
    const int64_t begin = blockIdx.x / strips * kStripRows, end = min(a.rows, begin + kStripRows);
    const Word* source = static_cast<const Word*>(a.weight);
    Word* out = static_cast<Word*>(a.out);
    const int64_t first = a.keep[left] / kPerWord;  // in 16-byte words of a row
    const int64_t span = a.keep[right - 1] / kPerWord + 1 - first;
    const bool mine = column < right;
    int64_t from[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) from[i] = mine ? a.keep[column + i] : 0;
    if (span > kTileWords) {
        if (!mine) return;
        for (int64_t row = begin; row < end; ++row) {
            Pack pack;
#pragma unroll
            for (int i = 0; i < kWide; ++i) pack.value[i] = __ldcs(source + row * a.row_stride + from[i]);
            *reinterpret_cast<Pack*>(out + row * a.columns + column) = pack;
        }
        return;
    }
    const int words = int(span), height = min(kStripRows, kTileWords / words);
    int at[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) at[i] = int(from[i] - first * kPerWord);
    for (int64_t top = begin; top < end; top += height) {
        const int rows = int(min(int64_t(height), end - top));
        for (int row = threadIdx.x / 32; row < rows; row += kThreads / 32) {
            const uint4* line = reinterpret_cast<const uint4*>(source + (top + row) * a.row_stride) + first;
            for (int word = threadIdx.x % 32; word < words; word += 32) {
                copy_async(tile + row * words + word, line + word);
            }
        }
        wait_for_copies();
        __syncthreads();
        if (mine) {
            const Word* from_tile = reinterpret_cast<const Word*>(tile);
#pragma unroll 4
            for (int row = 0; row < rows; ++row) {
                Pack pack;
#pragma unroll
                for (int i = 0; i < kWide; ++i) pack.value[i] = from_tile[row * words * kPerWord + at[i]];
                *reinterpret_cast<Pack*>(out + (top + row) * a.columns + column) = pack;
            }
        }
        __syncthreads();
    }
}

template <typename Word, int kWide>
void launch_pack(const CompactArgs& a) {
    const int64_t strips = divide_up(a.columns, kThreads * kWide), blocks = strips * divide_up(a.rows, kStripRows);
    if (blocks > 0x7fffffff) throw std::runtime_error("weight: too many elements for one launch of the cuda backend");
    pack_columns<Word, kWide><<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(a, strips);
}

template <typename Word>
void launch_columns(const CompactArgs& a) {
    const bool words = a.column_stride == 1 && a.row_stride % (16 / sizeof(Word)) == 0 &&
                       reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
    if (words) {
        constexpr int kPair = sizeof(Word) == 2 ? 2 : 1;  // 4 bytes a thread, so that a warp writes whole lines
        const bool pairs = a.columns % kPair == 0 && reinterpret_cast<uintptr_t>(a.out) % 4 == 0;
        return pairs ? launch_pack<Word, kPair>(a) : launch_pack<Word, 1>(a);
    }
    const int64_t strips = divide_up(a.columns, kThreads);
    const int64_t wanted = divide_up(int64_t(multiprocessors()) * 16, strips);  // blocks: two waves of eight per SM
    const int64_t length = std::max<int64_t>(16, divide_up(divide_up(a.rows, wanted), 16) * 16);
    const int64_t blocks = strips * divide_up(a.rows, length);
    if (blocks > 0x7fffffff) throw std::runtime_error("weight: too many elements for one launch of the cuda backend");
    gather_columns<Word><<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(a, strips, length);
}

template <typename Word>
void launch(const CompactArgs& a) {
    if (a.axis == 1) return launch_columns<Word>(a);
    const int64_t per_word = 16 / sizeof(Word);
    const bool words = a.column_stride == 1 && a.columns % per_word == 0 && a.row_stride % per_word == 0 &&
                       reinterpret_cast<uintptr_t>(a.weight) % 16 == 0 && reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
    if (words)
        launch_rows<uint4>(a, a.columns / per_word, a.row_stride / per_word, 1);
    else
        launch_rows<Word>(a, a.columns, a.row_stride, a.column_stride);
}

}  // namespace

void compact_cuda(const CompactArgs& a) {
    if (a.rows == 0 || a.columns == 0) return;
    if (a.element_size == 2)
        launch<unsigned short>(a);
    else
        launch<unsigned int>(a);
    HYWIA_CHECK_CUDA(cudaGetLastError());
}

}  // namespace hywia
