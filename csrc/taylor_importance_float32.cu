// Taylor importance of float32 weights read in 16-byte words.
#include "taylor_launch.cuh"

namespace hywia {

void launch_taylor_float32(const TaylorKernelArgs& a) { launch_taylor_alike<float, 4>(a); }

}  // namespace hywia
