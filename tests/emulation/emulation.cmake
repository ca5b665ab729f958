# SPDX-License-Identifier: Apache-2.0
# Gives the library CUDA kernels that are compiled for the host and run by emulation. For tests alone.

target_sources(tenp PRIVATE ${TENP_CUDA_SOURCES} tests/emulation/emulation.cpp)
# A header found in tests/emulation takes the place of the one of the toolkit or of csrc.
target_include_directories(tenp BEFORE PRIVATE tests/emulation)
set_source_files_properties(
    ${TENP_CUDA_SOURCES}
    PROPERTIES
        LANGUAGE CXX
        # The kernels are device code: nvcc, not the host compiler, says what their warnings are.
        COMPILE_OPTIONS "-x;c++;-O2;-w"
)
if(TENP_SANITIZE STREQUAL "thread")
    # What the emulation itself does is no access of a kernel.
    set_source_files_properties(
        tests/emulation/emulation.cpp
        PROPERTIES COMPILE_OPTIONS "-fno-sanitize=thread" COMPILE_DEFINITIONS TENP_FIND_RACES
    )
endif()
