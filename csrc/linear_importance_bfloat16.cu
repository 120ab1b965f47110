// linear_importance of bfloat16 tensors.
#include "linear_importance.cuh"

namespace hywia {

const LinearKernel& linear_kernel_bfloat16(LinearVariant variant, bool columns) {
    return columns ? kernel_for<__nv_bfloat16, true>(variant, 0) : kernel_for<__nv_bfloat16, false>(variant, 0);
}

}  // namespace hywia
