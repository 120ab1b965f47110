// Taylor importance of float16 weights read in 16-byte words.
#include "taylor_launch.cuh"

namespace hywia {

void launch_taylor_float16(const TaylorKernelArgs& a) { launch_taylor_half<__half>(a); }

}  // namespace hywia
