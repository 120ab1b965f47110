// linear_importance on Hopper: how a tile lies in shared memory, the order of tiles, and the warp that fetches them.
#pragma once

#include "hopper.cuh"
#include "linear_importance_cuda.h"

namespace hywia {

constexpr int kTileM = 128, kStepK = kLinearStepTokens;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kLinearThreads = 128 * (kConsumers + 1);
constexpr uint32_t kChunkBytes = kStepK * 128;    // 64 elements by 64 tokens
constexpr uint32_t kWeightBytes = 128 * 128 * 2;  // a 128 x 128 tile: two boxes of 64 x 128
constexpr uint32_t kWeightBoxBytes = kWeightBytes / 2;

// `whole` and `fine` (no signed sums) need the weight only when a tile's product is done: its tile follows through the
// stages. With signed sums it is read for every sample, and has two buffers of its own.
template <bool whole, bool signed_sums>
struct LinearTile {
    static constexpr int kN = whole ? 256 : 128;
    static constexpr int kWeights = whole || !signed_sums ? 0 : 2;
    static constexpr int kStages = whole ? 4 : 7 - kWeights;
    static constexpr int kAccumulators = kN / 2;
    static constexpr uint32_t kABytes = kTileM * kStepK * 2, kBBytes = kN * kStepK * 2;
    static constexpr uint32_t kStageBytes = kABytes + kBBytes;
    static constexpr uint32_t kBarriers = 2 * kStages + 2 * (kWeights ? kWeights : 1);
    static constexpr uint32_t kSharedBytes = kStages * kStageBytes + kWeights * kWeightBytes + kBarriers * 8 + 1024;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace linear {

using namespace hopper;

// A position in a ring of `size` slots: which slot, and the parity of its phase.
template <int size>
struct Ring {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == size) slot = 0, parity ^= 1;
    }
};

// Shared-memory addresses of one block.
template <typename Tile>
struct Shared {
    uint32_t base, barriers;
    __device__ __forceinline__ explicit Shared(uint32_t dynamic)
        : base((dynamic + 1023) & ~1023u),
          barriers(base + Tile::kStages * Tile::kStageBytes + Tile::kWeights * kWeightBytes) {}
    __device__ __forceinline__ uint32_t a(int slot) const { return base + slot * Tile::kStageBytes; }
    __device__ __forceinline__ uint32_t b(int slot) const { return a(slot) + Tile::kABytes; }
    __device__ __forceinline__ uint32_t weight(int buffer) const {
        return base + Tile::kStages * Tile::kStageBytes + buffer * kWeightBytes;
    }
    __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 8 * slot; }
    __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 8 * (Tile::kStages + slot); }
    __device__ __forceinline__ uint32_t weight_full(int buffer) const {
        return barriers + 8 * (2 * Tile::kStages + buffer);
    }
    __device__ __forceinline__ uint32_t weight_empty(int buffer) const {
        return barriers + 8 * (2 * Tile::kStages + Tile::kWeights + buffer);
    }
};

// This block's place in its cluster, and whom it shares operands with.
template <int CM, int CN>
struct Place {
    int m, n;
    __device__ __forceinline__ explicit Place(int rank) : m(rank % CM), n(rank / CM) {}
    __device__ __forceinline__ uint16_t same_m() const {  // blocks that read the same grad_output columns
        uint16_t mask = 0;
        for (int i = 0; i < CN; ++i) mask |= uint16_t(1) << (i * CM + m);
        return mask;
    }
    __device__ __forceinline__ uint16_t same_n() const {
        uint16_t mask = 0;
        for (int i = 0; i < CM; ++i) mask |= uint16_t(1) << (n * CM + i);
        return mask;
    }
    // Blocks whose copies land in this block's stages: itself, those of one m and those of one n.
    static constexpr int kSharers = CM + CN - 1;
    __device__ __forceinline__ int sharer(int i) const { return i < CN ? i * CM + m : n * CM + (m + i - CN + 1) % CM; }
};

// The tiles of one cluster, in order.
struct Walk {
    const LinearPlan& plan;
    int lane_m, lane_n, step;  // `step` counts n tiles over all groups

    __device__ __forceinline__ Walk(const LinearPlan& p, int cluster)
        : plan(p), lane_m(cluster % p.across), lane_n(cluster / p.across), step(lane_n) {}
    __device__ __forceinline__ int m() const { return step / plan.n_tiles * plan.across + lane_m; }
    __device__ __forceinline__ int n() const { return step % plan.n_tiles; }
    // Only the last group may be short of m tiles.
    __device__ __forceinline__ bool more() const { return step < plan.groups * plan.n_tiles && m() < plan.m_tiles; }
    __device__ __forceinline__ bool fresh() const { return n() < plan.share; }                 // first of its m tile
    __device__ __forceinline__ bool last() const { return n() + plan.share >= plan.n_tiles; }  // and last
    __device__ __forceinline__ void advance() { step += plan.share; }
};

// Tokens of sample `s`.
template <bool ragged>
__device__ __forceinline__ void sample_range(const LinearKernelArgs& p, int s, int& begin, int& end) {
    if constexpr (ragged) {
        begin = __ldg(p.offsets + s), end = __ldg(p.offsets + s + 1);
    } else {
        begin = s * p.length, end = begin + p.length;
    }
}

// A 128 x 128 piece of the weight as two boxes: [128 m][64 n] twice, or [128 n][64 m] twice when units are columns.
template <bool columns>
__device__ __forceinline__ void copy_weight(uint32_t to, const CUtensorMap* map, int m, int n, uint32_t barrier) {
    for (int i = 0; i < 2; ++i) {
        if constexpr (columns)
            copy_box(to + i * kWeightBoxBytes, map, m + i * 64, n, barrier, kEvictFirst);
        else
            copy_box(to + i * kWeightBoxBytes, map, n + i * 64, m, barrier, kEvictFirst);
    }
}

// This block's `chunks` of an operand's step, to itself or, where `sharing` blocks of the cluster read them, to
// `blocks`.
template <int chunks, int sharing>
__device__ __forceinline__ void copy_chunks(uint32_t to, const CUtensorMap* map, int place, int column, int token,
                                            uint32_t barrier, uint16_t blocks) {
    for (int i = 0; i < chunks; ++i) {
        const int chunk = sharing == 1 ? i : place * chunks + i;
        if constexpr (sharing == 1)
            copy_box(to + chunk * kChunkBytes, map, column + chunk * 64, token, barrier, kEvictNormal);
        else
            copy_box_multicast(to + chunk * kChunkBytes, map, column + chunk * 64, token, barrier, blocks,
                               kEvictNormal);
    }
}

template <bool whole, bool signed_sums, bool ragged, bool columns, int CM, int CN>
__device__ void produce(const LinearKernelArgs& p, const CUtensorMap* map_a, const CUtensorMap* map_b,
                        const CUtensorMap* map_w, const Shared<LinearTile<whole, signed_sums>>& shared,
                        Place<CM, CN> place, Walk walk) {
    using Tile = LinearTile<whole, signed_sums>;
    constexpr int kAChunks = kTileM / 64 / CN, kBChunks = Tile::kN / 64 / CM;  // this block's part of each operand
    Ring<Tile::kStages> ring;
    Ring<Tile::kWeights ? Tile::kWeights : 1> buffer;
    const uint16_t same_m = place.same_m(), same_n = place.same_n();
    for (; walk.more(); walk.advance()) {
        const int m = (walk.m() * CM + place.m) * kTileM, n = (walk.n() * CN + place.n) * Tile::kN;
        if constexpr (Tile::kWeights > 0) {
            barrier_wait(shared.weight_empty(buffer.slot), buffer.parity ^ 1);
            barrier_expect(shared.weight_full(buffer.slot), kWeightBytes);
            copy_weight<columns>(shared.weight(buffer.slot), map_w, m, n, shared.weight_full(buffer.slot));
            buffer.advance();
        }
        for (int s = 0; s < (whole ? 1 : p.samples); ++s) {
            int begin = 0, end = p.tokens;
            if constexpr (!whole) sample_range<ragged>(p, s, begin, end);
            for (int token = begin; token < end; token += kStepK) {
                barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
                const uint32_t full = shared.full(ring.slot);
                barrier_expect(full, Tile::kStageBytes);
                copy_chunks<kAChunks, CN>(shared.a(ring.slot), map_a, place.n, m, token, full, same_m);
                copy_chunks<kBChunks, CM>(shared.b(ring.slot), map_b, place.m, n, token, full, same_n);
                ring.advance();
            }
        }
        if constexpr (Tile::kWeights == 0) {  // the weight's tile follows, 128 columns a stage
            for (int half = 0; half < Tile::kN / 128; ++half) {
                barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
                barrier_expect(shared.full(ring.slot), kWeightBytes);
                copy_weight<columns>(shared.a(ring.slot), map_w, m, n + half * 128, shared.full(ring.slot));
                ring.advance();
            }
        }
    }
}

}  // namespace linear

#endif

}  // namespace hywia
