# SPDX-License-Identifier: Apache-2.0
# Turns the library into one whose CUDA kernels are compiled for the host and run by emulation, also
# for arrays on the CPU. For tests alone.

get_target_property(_sources tenp SOURCES)
list(
    FILTER _sources EXCLUDE
    REGEX "csrc/cpu/(activation_stats|direction_change|expert_[a-z]+|neuron_contribution|routing|second_moment)[.]cpp"
)
set_target_properties(tenp PROPERTIES SOURCES "${_sources}")
target_sources(tenp PRIVATE ${TENP_CUDA_SOURCES} tests/emulation/backend.cpp tests/emulation/emulation.cpp)
# A header found in tests/emulation takes the place of the one of the toolkit or of csrc.
target_include_directories(tenp BEFORE PRIVATE tests/emulation)
set_source_files_properties(
    ${TENP_CUDA_SOURCES}
    PROPERTIES
        LANGUAGE CXX
        # The kernels are device code: nvcc, not the host compiler, says what their warnings are.
        COMPILE_OPTIONS "-x;c++;-O2;-w"
)
