// linear_importance of bfloat16 tensors.
#include "linear_importance.cuh"

namespace hywia {

const LinearKernel& linear_kernel_bfloat16(LinearMode mode, bool ragged, bool columns) {
    return columns ? kernel_for<__nv_bfloat16, true>(mode, ragged, 0)
                   : kernel_for<__nv_bfloat16, false>(mode, ragged, 2 * kLinearModes);
}

}  // namespace hywia
