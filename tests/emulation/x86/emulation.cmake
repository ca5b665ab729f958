# SPDX-License-Identifier: Apache-2.0
# Compiles the kernels for AMX and AVX512-BF16 with a header that stands in for the compiler's, so that
# they run on any x86-64. For tests alone.

target_sources(tenp PRIVATE tests/emulation/x86/features.cpp)
set_property(
    SOURCE csrc/cpu/isa/amx.cpp csrc/cpu/isa/avx512bf16.cpp
    PROPERTY INCLUDE_DIRECTORIES ${PROJECT_SOURCE_DIR}/tests/emulation/x86
)
set_property(
    SOURCE csrc/cpu/isa/amx.cpp csrc/cpu/isa/avx512bf16.cpp
    PROPERTY COMPILE_DEFINITIONS __AVX2__ __AVX512F__ __AVX512BF16__ __AMX_TILE__ __AMX_BF16__
)
# Vectors of 64 bytes are passed in memory, which code for AVX-512 would not understand.
set_property(
    SOURCE csrc/cpu/isa/amx.cpp csrc/cpu/isa/avx512bf16.cpp
    PROPERTY COMPILE_OPTIONS -Wno-psabi
)
