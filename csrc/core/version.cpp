// SPDX-License-Identifier: Apache-2.0
#include "tenp/version.h"

namespace tenp {

const char* version() noexcept {
    return TENP_VERSION;
}

}  // namespace tenp
