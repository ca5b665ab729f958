// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tenp::cpu {

/// The larger of two values; NaN when one of them is.
inline double max_or_nan(double a, double b) {
    return b > a || b != b ? b : a;
}

}  // namespace tenp::cpu
