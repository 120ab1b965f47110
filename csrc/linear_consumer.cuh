// linear_importance on Hopper: what the consuming warpgroups of all forms share: the ring, the products, the tables.
#pragma once

#include "linear_tiles.cuh"

namespace hywia {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace linear {

// Where this lane's row of four 8x8 matrices of a 128 x 128 weight tile lies, for load_matrices: the warp's 16 rows and
// the 16 columns that go with the accumulator registers 8·j .. 8·j + 7. The swizzle is an exclusive or, so one address
// and constants serve all j.
template <bool columns>
struct WeightAddress {
    uint32_t first;

    __device__ __forceinline__ WeightAddress(uint32_t tile, int group, int warp, int lane) {
        const int matrix = lane / 8, inner = lane % 8;
        if constexpr (columns) {  // memory rows are n, 128 bytes of m each; box `group` holds this warpgroup's 64 m
            const int n = (matrix >> 1) * 8 + inner, chunk = warp * 2 + (matrix & 1);
            first = tile + group * kWeightBoxBytes + n * 128 + ((chunk ^ inner) << 4);
        } else {
            const int m = group * 64 + warp * 16 + (matrix & 1) * 8 + inner, chunk = matrix >> 1;
            first = tile + m * 128 + ((chunk ^ inner) << 4);
        }
    }
    __device__ __forceinline__ uint32_t at(int j) const {
        return columns ? first + j * 2048 : (first ^ ((j % 4) * 32)) + j / 4 * kWeightBoxBytes;
    }
};

__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// One warpgroup, of 64 rows of the tile. Its ring runs exactly as the producer's.
template <typename T, LinearMode mode, bool ragged, bool columns>
struct Consumer {
    using Tile = LinearTile<mode>;
    const LinearKernelArgs& p;
    const Shared<Tile>& shared;
    int rank, group, warp, lane;
    Ring<Tile::kStages> ring;
    bool lead;  // Merged: the first warpgroup has yet to let the second begin

    // Both blocks copy into this slot of either, and hear of it from each warp.
    __device__ __forceinline__ void release(int slot) const {
        __syncwarp();
        if (lane < kLinearCluster) barrier_arrive_cluster(shared.empty(slot), lane);
    }

    __device__ __forceinline__ void wait_full() const { barrier_wait(shared.full(ring.slot), ring.parity); }
    __device__ __forceinline__ void done_with_stage() {
        release(ring.slot);
        ring.advance();
    }
    __device__ __forceinline__ WeightAddress<columns> weight_at(uint32_t tile) const {
        return WeightAddress<columns>(tile, group, warp, lane);
    }

    // Zeroes a stage from token `valid` on: those rows belong to the next sample. Both operands, since that sample's
    // NaN times zero would be NaN here; this warpgroup's part of A, and all of B, which the other zeroes too: it may be
    // a sample behind, and the same value twice is no race.
    __device__ __forceinline__ void mask(int slot, int valid) const {
        const uint32_t a = shared.a(slot) + group * kChunkBytes, b = shared.b(slot);
        for (int word = valid * 8 + warp * 32 + lane; word < kStepK * 8; word += 128) {
            store_zero(a + word * 16);
#pragma unroll
            for (int chunk = 0; chunk < Tile::kN / 64; ++chunk) store_zero(b + chunk * kChunkBytes + word * 16);
        }
        fence_async_proxy();
        group == 0 ? warpgroup_sync<1>() : warpgroup_sync<2>();
    }

    // The two warpgroups take turns at the tensor cores, so that one works on its sums while the other multiplies; left
    // alone they run in step, and the tensor cores idle through both epilogues. A turn is
    // handed over when the second stage's products are issued, which leaves two stages in flight for the other to queue
    // behind; handing it over when the first is done was no faster at 10 samples of 128 tokens and 3 % slower at 128.
    // It must not be held for longer: the ring holds more than two stages, so waiting for a turn cannot starve the
    // other warpgroup of them. Merged needs this once: the second warpgroup starts late and stays behind.
    __device__ __forceinline__ void take_turn() const { group == 0 ? named_sync<3>() : named_sync<4>(); }
    __device__ __forceinline__ void pass_turn() const { group == 0 ? named_arrive<4>() : named_arrive<3>(); }
    __device__ __forceinline__ void hand_over() {
        if constexpr (!Tile::kMerged)
            pass_turn();
        else if (lead)
            pass_turn(), lead = false;
    }

    // The product over one stage; `fresh` overwrites d.
    __device__ __forceinline__ void multiply_stage(float (&d)[Tile::kAccumulators], bool fresh) const {
        const uint64_t a = outer_major_descriptor(shared.a(ring.slot) + group * kChunkBytes, kChunkBytes);
        const uint64_t b = outer_major_descriptor(shared.b(ring.slot), kChunkBytes);
        product_begin();
#pragma unroll
        for (int k = 0; k < kStepK / 16; ++k)
            Product<T>::add(d, a + k * kDescriptorStep, b + k * kDescriptorStep, !fresh || k > 0);
        product_commit();
    }

    // The product over tokens [begin, end), at least one, into `d`, which it overwrites.
    __device__ __forceinline__ void multiply(float (&d)[Tile::kAccumulators], int begin, int end) {
        wait_full();
        if constexpr (!Tile::kMerged) {
            if (end - begin < kStepK) mask(ring.slot, end - begin);
            take_turn();
        }
        multiply_stage(d, true);
        const int second = begin + kStepK;
        if (second >= end) hand_over();
        for (int token = second; token < end; token += kStepK) {
            const int previous = ring.slot;
            ring.advance();
            wait_full();
            if constexpr (!Tile::kMerged)
                if (end - token < kStepK) mask(ring.slot, end - token);
            multiply_stage(d, false);
            if (token == second) hand_over();
            product_wait<1>();
            release(previous);
        }
        product_wait<0>();
        product_fence(d);
        done_with_stage();
    }

    // Where this lane adds a quantity's sum over one of the warp's rows: of a quad, lane 0 serves row lane/4, lane 1
    // row lane/4 + 8, the others none.
    __device__ __forceinline__ int64_t row(const Walk& walk) const {
        return (walk.m() * kLinearCluster + rank) * kTileM + group * 64 + warp * 16 + lane / 4 + (lane & 1) * 8;
    }
    __device__ __forceinline__ float* fine_slot(const Walk& walk) const {
        return p.partial + walk.lane_n * p.plan.fine_table + row(walk);
    }
    __device__ __forceinline__ float* signed_slot(const Walk& walk) const {
        return p.partial + p.plan.signed_at + walk.lane_n * p.plan.signed_table + row(walk);
    }
    __device__ __forceinline__ bool writes() const { return (lane & 2) == 0; }
    __device__ __forceinline__ float pick(float upper, float lower) const {  // both quad sums; this lane's row
        upper = quad_sum(upper), lower = quad_sum(lower);
        return lane & 1 ? lower : upper;
    }
    __device__ __forceinline__ void add_to(float* slot, bool fresh, float sum) const {
        if (writes()) *slot = (fresh ? 0.0f : *slot) + sum;
    }
};

}  // namespace linear

#endif

}  // namespace hywia
