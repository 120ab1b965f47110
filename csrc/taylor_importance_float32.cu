// Taylor importance of float32 weights read in 16-byte words.
#include "taylor_launch.cuh"

namespace hywia {

void launch_taylor_float32(const TaylorKernelArgs& a) {
    switch (a.op.order) {
        case Order::First:
            return launch_taylor<Order::First, float, float, void, 4>(a);
        case Order::Second:
            return launch_taylor<Order::Second, float, void, float, 4>(a);
        case Order::Mixed:
            return launch_taylor<Order::Mixed, float, float, float, 4>(a);
    }
}

}  // namespace hywia
