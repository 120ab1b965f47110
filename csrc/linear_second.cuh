// linear_importance on Hopper, Second: one product per sample in tiles of 128 x 256, reduced before the next one.
//
// Second order needs the sum of (G_s·w)² over samples and weights, in any order. So nothing but two sums a row is kept
// from sample to sample, and the registers that the sums over samples take in the other forms hold the weight's tile,
// two of its elements in each of 64. A tile twice as wide reads a quarter less, and the signed sums cost an addition.
#pragma once

#include "linear_consumer.cuh"

namespace hywia {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace linear {

template <typename T, bool ragged, bool columns>
struct SecondConsumer : Consumer<T, LinearMode::Second, ragged, columns> {
    using Base = Consumer<T, LinearMode::Second, ragged, columns>;
    using Base::group, Base::p, Base::ring, Base::shared;

    __device__ __forceinline__ void run(Walk walk) {
        if (group == 1) this->pass_turn();  // the first turn is the other's
        for (; walk.more(); walk.advance()) {
            uint32_t w[16][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                this->wait_full();
                const WeightAddress<columns> weight = this->weight_at(shared.a(ring.slot));
#pragma unroll
                for (int j = 0; j < 8; ++j) load_matrices<columns>(w[half * 8 + j], weight.at(j));
                __threadfence_block();  // nothing has waited for the loads yet, and the next copy may land here
                this->done_with_stage();
            }
            const bool fresh = walk.fresh();
            float* at = this->signed_slot(walk);
            float fine[2] = {};
            for (int s = 0; s < p.samples; ++s, at += p.plan.row_stride) {
                int begin, end;
                sample_range<ragged>(p, s, begin, end);
                float before = 0.0f;  // on its way while the product runs
                if (!fresh && this->writes()) before = *at;
                float d[128], q[2][2] = {}, h[2][2] = {};  // of two rows, two sums each, so that additions overlap
                this->multiply(d, begin, end);
                // No sample is empty. Without a branch here ptxas releases the last stage behind the sums, 500
                // instructions late, and the copies for the next sample wait for it.
                if (end <= begin) continue;
#pragma unroll
                for (int j = 0; j < 16; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 pair = unpack<T>(w[j][i]);
                        const float t0 = d[j * 8 + i * 2] * pair.x, t1 = d[j * 8 + i * 2 + 1] * pair.y;
                        q[i & 1][0] += t0 * t0, q[i & 1][1] += t1 * t1;
                        h[i & 1][0] += t0, h[i & 1][1] += t1;
                    }
                }
                fine[0] += q[0][0] + q[0][1], fine[1] += q[1][0] + q[1][1];
                const float total = this->pick(h[0][0] + h[0][1], h[1][0] + h[1][1]);
                if (this->writes()) *at = before + total * p.scale;
            }
            this->add_to(this->fine_slot(walk), fresh, this->pick(fine[0], fine[1]) * (0.5f * p.square_scale));
        }
        if (group == 0) this->take_turn();  // the other's last pass
    }
};

}  // namespace linear

#endif

}  // namespace hywia
