# SPDX-License-Identifier: Apache-2.0
# Flags for people who work on tenp; a consumer never needs them.

option(TENP_WERROR "Treat warnings as errors" OFF)
set(TENP_SANITIZE "" CACHE STRING "Sanitizers to build with, as in -fsanitize=: address,undefined or thread")

function(tenp_developer_flags target)
    set(_warnings -Wall -Wextra -Wconversion -Wshadow)
    set(_cuda_warnings -Xptxas=-warn-spills)
    if(TENP_WERROR)
        list(APPEND _warnings -Werror)
        list(APPEND _cuda_warnings -Werror=all-warnings)
    endif()
    target_compile_options(
        ${target}
        PRIVATE
            "$<$<COMPILE_LANGUAGE:CXX>:${_warnings}>" "$<$<COMPILE_LANGUAGE:CUDA>:${_cuda_warnings}>"
    )
    if(TENP_SANITIZE)
        set(_sanitize -fsanitize=${TENP_SANITIZE} -fno-sanitize-recover=all)
        target_compile_options(${target} PUBLIC "$<$<COMPILE_LANGUAGE:CXX>:${_sanitize}>")
        target_link_options(${target} PUBLIC ${_sanitize})
    endif()
endfunction()
