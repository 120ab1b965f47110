// linear_importance of float16 tensors.
#include "linear_importance.cuh"

namespace hywia {

const LinearKernel& linear_kernel_float16(LinearMode mode, bool ragged, bool columns) {
    return columns ? kernel_for<__half, true>(mode, ragged, 4 * kLinearModes)
                   : kernel_for<__half, false>(mode, ragged, 6 * kLinearModes);
}

}  // namespace hywia
