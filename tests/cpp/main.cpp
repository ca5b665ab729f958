// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "tenp/device.h"
#include "tenp/error.h"

int main(int argc, char** argv) {
    try {
        std::printf("CPU kernels: %s\n", tenp::cpu_isa());
    } catch (const tenp::Unsupported& error) {
        std::printf("skipped: %s\n", error.what());
        return 77;  // SKIP_RETURN_CODE
    }
    return doctest::Context(argc, argv).run();
}
