// Launches the kernels of Taylor importance for one mix of dtypes. Included by taylor_importance_*.cu.
#pragma once

#include "taylor_strips.cuh"

namespace hywia {

template <Order order, typename W, typename G, typename F, int count>
void launch_taylor(const TaylorKernelArgs& a) {
    const auto stream = static_cast<cudaStream_t>(a.op.stream);
    if constexpr (count > 1) {
        if (a.plan.strips) {
            taylor_strips<order, W, G, F, count><<<unsigned(a.plan.blocks), kStripThreads, 0, stream>>>(a);
            HYWIA_CHECK_CUDA(cudaGetLastError());
            return;
        }
        if (a.plan.whole_rows) {
            const auto kernel = a.op.reduce <= kRowThreads * count * 3 / 2
                                    ? taylor_whole_rows<order, W, G, F, count, 1>
                                    : taylor_whole_rows<order, W, G, F, count, 2>;
            kernel<<<unsigned(a.plan.blocks), kRowThreads, 0, stream>>>(a);
            HYWIA_CHECK_CUDA(cudaGetLastError());
            return;
        }
    }
    const auto kernel = a.plan.rows ? taylor_rows<order, W, G, F, count> : taylor_columns<order, W, G, F, count>;
    kernel<<<unsigned(a.plan.blocks), kThreads, 0, stream>>>(a);
    HYWIA_CHECK_CUDA(cudaGetLastError());
}

// Operands of one type.
template <typename T, int count>
void launch_taylor_alike(const TaylorKernelArgs& a) {
    switch (a.op.order) {
        case Order::First:
            return launch_taylor<Order::First, T, T, void, count>(a);
        case Order::Second:
            return launch_taylor<Order::Second, T, void, T, count>(a);
        case Order::Mixed:
            return launch_taylor<Order::Mixed, T, T, T, count>(a);
    }
}

// One instantiation per dtype of the weight, each in its own file so that they compile in parallel. The dtypes of
// the other operands: `Other` is the weight's own.
void launch_taylor_float32(const TaylorKernelArgs& a);
void launch_taylor_bfloat16(const TaylorKernelArgs& a);
void launch_taylor_float16(const TaylorKernelArgs& a);

// Gradient and Fisher information in the weight's type or in float32; a Fisher of the weight's type needs a gradient
// of it too. ops/cuda.py turns the rest away.
template <typename W>
void launch_taylor_half(const TaylorKernelArgs& a) {
    const bool g32 = a.op.grad.dtype == DType::Float32, f32 = a.op.fisher.dtype == DType::Float32;
    switch (a.op.order) {
        case Order::First:
            return g32 ? launch_taylor<Order::First, W, float, void, 8>(a)
                       : launch_taylor<Order::First, W, W, void, 8>(a);
        case Order::Second:
            return f32 ? launch_taylor<Order::Second, W, void, float, 8>(a)
                       : launch_taylor<Order::Second, W, void, W, 8>(a);
        case Order::Mixed:
            return g32   ? launch_taylor<Order::Mixed, W, float, float, 8>(a)
                   : f32 ? launch_taylor<Order::Mixed, W, W, float, 8>(a)
                         : launch_taylor<Order::Mixed, W, W, W, 8>(a);
    }
}

}  // namespace hywia
