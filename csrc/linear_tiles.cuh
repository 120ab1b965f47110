// linear_importance on Hopper: how a tile lies in shared memory, the order of tiles, and the warp that fetches them.
#pragma once

#include "hopper.cuh"
#include "linear_importance_cuda.h"

namespace hywia {

constexpr int kTileM = kLinearTileM, kStepK = kLinearStepTokens;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kLinearThreads = 128 * (kConsumers + 1);
constexpr uint32_t kChunkBytes = kStepK * 128;    // 64 elements by 64 tokens
constexpr uint32_t kWeightBytes = 128 * 128 * 2;  // a 128 x 128 tile: two boxes of 64 x 128
constexpr uint32_t kWeightBoxBytes = kWeightBytes / 2;

// When the weight's tile is read decides how it comes. Merged and Sums need it once a tile's products are done: it
// follows them through the stages. Second takes it into registers before the first product: it comes ahead of them.
// Samples and Squares read it for every sample, while the next tile's is on its way: it has two buffers of its own.
template <LinearMode mode>
struct LinearTile {
    static constexpr bool kMerged = mode == LinearMode::Merged;
    static constexpr bool kAhead = mode == LinearMode::Second;
    static constexpr bool kSquares = mode == LinearMode::Squares || mode == LinearMode::Sums;
    static constexpr int kN = linear_tile_n(mode);
    static constexpr int kWeights = mode == LinearMode::Samples || mode == LinearMode::Squares ? 2 : 0;
    static constexpr int kStages = kN == 256 ? 4 : 7 - kWeights;
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

// What one warp of a block fetches. `rank` is the block's place in its cluster: it fetches its own columns of A, and
// half of B for both blocks.
template <LinearMode mode, bool ragged, bool columns>
struct Producer {
    using Tile = LinearTile<mode>;
    const LinearKernelArgs& p;
    const CUtensorMap *map_a, *map_b, *map_w;
    const Shared<Tile>& shared;
    int rank;
    Ring<Tile::kStages> ring;
    Ring<Tile::kWeights ? Tile::kWeights : 1> buffer;

    // Waits for a free stage, of which `bytes` will be filled.
    __device__ __forceinline__ uint32_t next(uint32_t bytes) {
        barrier_wait(shared.empty(ring.slot), ring.parity ^ 1);
        barrier_expect(shared.full(ring.slot), bytes);
        return shared.full(ring.slot);
    }

    __device__ __forceinline__ void operands(int m, int n, int token) {
        constexpr int kHalf = Tile::kN / 64 / kLinearCluster;
        constexpr uint16_t kBoth = (1 << kLinearCluster) - 1;
        const uint32_t full = next(Tile::kStageBytes), a = shared.a(ring.slot), b = shared.b(ring.slot);
        for (int i = 0; i < kTileM / 64; ++i)
            copy_box(a + i * kChunkBytes, map_a, m + i * 64, token, full, kEvictNormal);
        for (int i = 0; i < kHalf; ++i) {
            const int chunk = rank * kHalf + i;
            copy_box_multicast(b + chunk * kChunkBytes, map_b, n + chunk * 64, token, full, kBoth, kEvictNormal);
        }
        ring.advance();
    }

    __device__ __forceinline__ void weight_in_stages(int m, int n) {
        for (int half = 0; half < Tile::kN / 128; ++half) {
            const uint32_t full = next(kWeightBytes);
            copy_weight<columns>(shared.a(ring.slot), map_w, m, n + half * 128, full);
            ring.advance();
        }
    }

    __device__ void run(Walk walk) {
        for (; walk.more(); walk.advance()) {
            const int m = (walk.m() * kLinearCluster + rank) * kTileM, n = walk.n() * Tile::kN;
            if constexpr (Tile::kWeights > 0) {
                const uint32_t full = shared.weight_full(buffer.slot);
                barrier_wait(shared.weight_empty(buffer.slot), buffer.parity ^ 1);
                barrier_expect(full, kWeightBytes);
                copy_weight<columns>(shared.weight(buffer.slot), map_w, m, n, full);
                buffer.advance();
            }
            if constexpr (Tile::kAhead) weight_in_stages(m, n);
            for (int s = 0; s < (Tile::kMerged ? 1 : p.samples); ++s) {
                int begin = 0, end = p.tokens;
                if constexpr (!Tile::kMerged) sample_range<ragged>(p, s, begin, end);
                for (int token = begin; token < end; token += kStepK) operands(m, n, token);
            }
            if constexpr (Tile::kWeights == 0 && !Tile::kAhead) weight_in_stages(m, n);
        }
    }
};

}  // namespace linear

#endif

}  // namespace hywia
