// linear_importance on Hopper, Merged: one product over all tokens, the weight's tile after it.
#pragma once

#include "linear_consumer.cuh"

namespace hywia {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace linear {

template <typename T, bool columns>
struct MergedConsumer : Consumer<T, LinearMode::Merged, false, columns> {
    using Base = Consumer<T, LinearMode::Merged, false, columns>;
    using Base::group, Base::p, Base::ring, Base::shared;

    __device__ __forceinline__ void run(Walk walk) {
        float fine[2] = {}, signed_sum[2] = {};
        if (group == 1) this->take_turn();
        for (; walk.more(); walk.advance()) {
            float d[128];
            this->multiply(d, 0, p.tokens);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                this->wait_full();
                const WeightAddress<columns> weight = this->weight_at(shared.a(ring.slot));
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    uint32_t w[4];
                    load_matrices<columns>(w, weight.at(j));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 pair = unpack<T>(w[i]);
                        const float t0 = d[half * 64 + j * 8 + i * 2] * pair.x;
                        const float t1 = d[half * 64 + j * 8 + i * 2 + 1] * pair.y;
                        fine[i & 1] += fabsf(t0), signed_sum[i & 1] += t0;
                        fine[i & 1] += fabsf(t1), signed_sum[i & 1] += t1;
                    }
                }
                this->done_with_stage();
            }
            if (walk.last()) {
                float* const slot = this->fine_slot(walk);
                this->add_to(slot, true, this->pick(fine[0], fine[1]) * p.mean_scale);
                this->add_to(slot + p.plan.row_stride, true, this->pick(signed_sum[0], signed_sum[1]) * p.mean_scale);
                fine[0] = fine[1] = signed_sum[0] = signed_sum[1] = 0.0f;
            }
        }
    }
};

}  // namespace linear

#endif

}  // namespace hywia
