// linear_importance on Hopper, Samples, Squares and Sums: one product per sample; the sum and the sum of squares of the
// samples' gradients stay in registers beside it, 3 x 64 of them a thread, which is why the tile is no larger.
//
// At 128 x 128 the operands' traffic from L2 is what limits: 256·T·2 bytes for 2·128·128·T flops are 10 TB/s at
// 650 TFLOP/s. That is why two blocks of a cluster share one operand (multicast).
#pragma once

#include "linear_consumer.cuh"

namespace hywia {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace linear {

template <typename T, LinearMode mode, bool ragged, bool columns>
struct SampleConsumer : Consumer<T, mode, ragged, columns> {
    using Base = Consumer<T, mode, ragged, columns>;
    using Base::group, Base::lane, Base::p, Base::ring, Base::shared;
    using typename Base::Tile;
    static constexpr bool squares = Tile::kSquares;
    static constexpr bool signed_sums = Tile::kWeights > 0;
    static constexpr int kFine = linear_fine_rows(mode);

    // One sample's gradient: into the sums over samples and, against the weight, into signed sums of two rows.
    __device__ __forceinline__ void add_sample(const float (&d)[64], [[maybe_unused]] WeightAddress<columns> weight,
                                               float (&sum)[64], float (&square)[squares ? 64 : 1],
                                               float (&h)[2]) const {
        uint32_t w[2][4];
        if constexpr (signed_sums) load_matrices<columns>(w[0], weight.at(0));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if constexpr (signed_sums)
                if (j < 7) load_matrices<columns>(w[(j + 1) % 2], weight.at(j + 1));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int e = j * 8 + i * 2;
                if constexpr (signed_sums) {
                    const float2 pair = unpack<T>(w[j % 2][i]);
                    h[i & 1] += d[e] * pair.x;
                    h[i & 1] += d[e + 1] * pair.y;
                }
                sum[e] += d[e], sum[e + 1] += d[e + 1];
                if constexpr (squares) square[e] += d[e] * d[e], square[e + 1] += d[e + 1] * d[e + 1];
            }
        }
    }

    // The fine sums of a tile, once all samples are in.
    __device__ __forceinline__ void finish_tile(WeightAddress<columns> weight, const float (&sum)[64],
                                                const float (&square)[squares ? 64 : 1],
                                                float (&fine)[kFine][2]) const {
        const float half_square = 0.5f * p.square_scale;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            uint32_t w[4];
            load_matrices<columns>(w, weight.at(j));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpack<T>(w[i]);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float value = k ? pair.y : pair.x;
                    const float t = sum[j * 8 + i * 2 + k] * value;
                    fine[0][i & 1] += fabsf(t);
                    if constexpr (squares) {
                        const float u = square[j * 8 + i * 2 + k] * (value * value);
                        fine[1][i & 1] += u;
                        fine[2][i & 1] += fabsf(t * p.mean_scale - u * half_square);
                    }
                }
            }
        }
        fine[0][0] *= p.mean_scale, fine[0][1] *= p.mean_scale;
        if constexpr (squares) fine[1][0] *= half_square, fine[1][1] *= half_square;
    }

    __device__ __forceinline__ void run(Walk walk) {
        Ring<signed_sums ? 2 : 1> buffer;
        if (group == 1) this->pass_turn();  // the first turn is the other's
        for (; walk.more(); walk.advance()) {
            const bool fresh = walk.fresh();
            float sum[64], square[squares ? 64 : 1];
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                sum[i] = 0.0f;
                if constexpr (squares) square[i] = 0.0f;
            }
            uint32_t tile = 0;
            if constexpr (signed_sums) {
                tile = shared.weight(buffer.slot);
                barrier_wait(shared.weight_full(buffer.slot), buffer.parity);
            }
            [[maybe_unused]] float* at = this->signed_slot(walk);
            for (int s = 0; s < p.samples; ++s) {
                int begin, end;
                sample_range<ragged>(p, s, begin, end);
                float before = 0.0f;  // on its way while the product runs
                if constexpr (signed_sums)
                    if (!fresh && this->writes()) before = *at;
                float d[64], h[2] = {};
                this->multiply(d, begin, end);
                add_sample(d, this->weight_at(tile), sum, square, h);
                if constexpr (signed_sums) {
                    const float total = this->pick(h[0], h[1]);
                    if (this->writes()) *at = before + total * p.scale;
                    at += p.plan.row_stride;
                }
            }
            if constexpr (!signed_sums) {
                tile = shared.a(ring.slot);
                this->wait_full();
            }
            float fine[kFine][2] = {};
            finish_tile(this->weight_at(tile), sum, square, fine);
            if constexpr (signed_sums) {
                __syncwarp();
                if (lane == 0) barrier_arrive(shared.weight_empty(buffer.slot));
                buffer.advance();
            } else {
                this->done_with_stage();
            }
            float* const slot = this->fine_slot(walk);
#pragma unroll
            for (int q = 0; q < kFine; ++q)
                this->add_to(slot + q * p.plan.row_stride, fresh, this->pick(fine[q][0], fine[q][1]));
        }
        if (group == 0) this->take_turn();  // the other's last pass
    }
};

}  // namespace linear

#endif

}  // namespace hywia
