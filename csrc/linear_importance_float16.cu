// linear_importance of float16 tensors.
#include "linear_importance.cuh"

namespace hywia {

const LinearKernel& linear_kernel_float16(const LinearVariant& variant) { return kernel_for<__half>(variant, 10); }

}  // namespace hywia
