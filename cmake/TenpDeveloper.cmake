# SPDX-License-Identifier: Apache-2.0
# Flags for people who work on tenp; a consumer never needs them.

option(TENP_SANITIZE "Build with AddressSanitizer and UndefinedBehaviorSanitizer" OFF)
option(TENP_WERROR "Treat warnings as errors" OFF)

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
        set(_sanitize -fsanitize=address,undefined -fno-sanitize-recover=all)
        target_compile_options(${target} PUBLIC "$<$<COMPILE_LANGUAGE:CXX>:${_sanitize}>")
        target_link_options(${target} PUBLIC ${_sanitize})
    endif()
endfunction()
