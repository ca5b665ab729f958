// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

#include "tenp/export.h"

// What the library throws: these classes and, when memory runs out, std::bad_alloc. Nothing is
// printed, nothing aborts. Messages read "<op>: <argument> must be <expected>, got <actual>".

namespace tenp {

/// Base of every error that tenp throws on purpose.
class TENP_API Error : public std::runtime_error {
 public:
    using std::runtime_error::runtime_error;
};

/// A shape, dtype, device, layout or value that the function does not accept.
class TENP_API InvalidArgument : public Error {
 public:
    using Error::Error;
};

/// A valid request that this build or this machine cannot serve.
class TENP_API Unsupported : public Error {
 public:
    using Error::Error;
};

/// The device refused: a launch or a runtime call failed.
class TENP_API DeviceError : public Error {
 public:
    using Error::Error;
};

}  // namespace tenp
