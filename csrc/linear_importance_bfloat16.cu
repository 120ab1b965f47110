// linear_importance of bfloat16 tensors.
#include "linear_importance.cuh"

namespace hywia {

const LinearKernel& linear_kernel_bfloat16(const LinearVariant& variant) {
    return kernel_for<__nv_bfloat16>(variant, 0);
}

}  // namespace hywia
