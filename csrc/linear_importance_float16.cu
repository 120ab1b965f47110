// linear_importance of float16 tensors.
#include "linear_importance.cuh"

namespace hywia {

const LinearKernel& linear_kernel_float16(LinearVariant variant, bool columns) {
    return columns ? kernel_for<__half, true>(variant, 1) : kernel_for<__half, false>(variant, 1);
}

}  // namespace hywia
