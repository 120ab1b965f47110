// Taylor importance of bfloat16 weights read in 16-byte words.
#include "taylor_launch.cuh"

namespace hywia {

void launch_taylor_bfloat16(const TaylorKernelArgs& a) { launch_taylor_half<__nv_bfloat16>(a); }

}  // namespace hywia
