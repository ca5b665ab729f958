// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tenp/tenp.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

// What the tests share: arrays between guards, arrays of any float type, and error messages.

namespace tenp::test {

inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// `count` values between two zones that nobody may write to, and under AddressSanitizer nobody may
/// read.
template <class T>
class Guarded {
 public:
    explicit Guarded(std::int64_t count, T value = T{})
        : values_(static_cast<std::size_t>(count) + 2 * kGuard, value) {
        for (T* guard : {values_.data(), data() + count}) {
            std::memset(guard, kPattern, kGuard * sizeof(T));
            ASAN_POISON_MEMORY_REGION(guard, kGuard * sizeof(T));
        }
    }
    Guarded(std::initializer_list<T> values) : Guarded(static_cast<std::int64_t>(values.size())) {
        std::copy(values.begin(), values.end(), data());
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() {
        ASAN_UNPOISON_MEMORY_REGION(values_.data(), values_.size() * sizeof(T));
        CHECK_MESSAGE(is_intact(0), "written before the array");
        CHECK_MESSAGE(is_intact(values_.size() - kGuard), "written after the array");
    }

    T* data() { return values_.data() + kGuard; }
    std::int64_t size() const {
        return std::ssize(values_) - 2 * static_cast<std::int64_t>(kGuard);
    }
    T& operator[](std::int64_t i) { return data()[i]; }
    std::vector<T> values() { return {data(), data() + size()}; }
    TensorView view(std::initializer_list<std::int64_t> shape) {
        return contiguous_view(data(), shape);
    }
    TensorView view() { return view({size()}); }

 private:
    static constexpr std::size_t kGuard = 16;
    static constexpr unsigned char kPattern = 0xa5;

    bool is_intact(std::size_t first) const {
        const auto* bytes = reinterpret_cast<const unsigned char*>(values_.data() + first);
        return std::all_of(bytes, bytes + kGuard * sizeof(T), [](unsigned char byte) {
            return byte == kPattern;
        });
    }

    std::vector<T> values_;
};

/// The float types of the ops.
inline constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

/// Spacing of the values just above 1.
inline double epsilon(DType dtype) {
    switch (dtype) {
        case DType::kBFloat16: return 0x1p-7;
        case DType::kFloat16: return 0x1p-10;
        default: return 0x1p-23;
    }
}

/// The nearest 16-bit float, ties to even.
inline std::uint16_t float16_bits(double value) {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::abs(value);
    if (!(size < 65520)) {
        return static_cast<std::uint16_t>(sign | (std::isnan(value) ? 0x7e00 : 0x7c00));
    }
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    const int fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<std::uint16_t>(sign | (((exponent + 15) << 10) + fraction - 1024));
}

inline double float16_value(std::uint16_t bits) {
    const int exponent = (bits >> 10) & 31;
    const int fraction = bits & 1023;
    double size =
        std::ldexp(exponent == 0 ? fraction : fraction + 1024, std::max(exponent, 1) - 25);
    if (exponent == 31) {
        size = fraction == 0 ? std::numeric_limits<double>::infinity() : kNan;
    }
    return (bits & 0x8000) != 0 ? -size : size;
}

/// `value` as the dtype has it.
inline double rounded(double value, DType dtype) {
    if (dtype == DType::kFloat16) {
        return float16_value(float16_bits(value));
    }
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
    if (dtype == DType::kFloat32 || value != value) {
        return static_cast<float>(value);
    }
    return std::bit_cast<float>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

/// A matrix of a float type whose rows are `stride` apart; what lies between rows is NaN and stays.
class Matrix {
 public:
    Matrix(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t gap = 0)
        : dtype_(dtype),
          rows_(rows),
          columns_(columns),
          stride_(columns + gap),
          wide_(dtype == DType::kFloat32 ? rows * stride_ : 0, static_cast<float>(kNan)),
          narrow_(dtype == DType::kFloat32 ? 0 : rows * stride_, 0x7fff) {}

    /// Multiples of 1/8 within +-2: exact in every float type.
    Matrix& fill(unsigned seed) {
        std::mt19937 random(seed);
        for (std::int64_t row = 0; row < rows_; ++row) {
            for (std::int64_t column = 0; column < columns_; ++column) {
                set(row, column, (static_cast<int>(random() % 33) - 16) / 8.0);
            }
        }
        return *this;
    }

    Matrix& fill_row(std::int64_t row, double value) {
        for (std::int64_t column = 0; column < columns_; ++column) {
            set(row, column, value);
        }
        return *this;
    }

    void set(std::int64_t row, std::int64_t column, double value) {
        const std::int64_t at = row * stride_ + column;
        if (dtype_ == DType::kFloat32) {
            wide_[at] = static_cast<float>(value);
        } else if (dtype_ == DType::kFloat16) {
            narrow_[at] = float16_bits(value);
        } else {
            const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
            narrow_[at] = static_cast<std::uint16_t>(bits >> 16);
        }
    }

    double get(std::int64_t row, std::int64_t column) {
        const std::int64_t at = row * stride_ + column;
        switch (dtype_) {
            case DType::kFloat32: return wide_[at];
            case DType::kFloat16: return float16_value(narrow_[at]);
            default: return std::bit_cast<float>(std::uint32_t{narrow_[at]} << 16);
        }
    }

    /// Bits of the elements, for comparisons that must be exact.
    std::vector<double> values() {
        std::vector<double> values;
        for (std::int64_t row = 0; row < rows_; ++row) {
            for (std::int64_t column = 0; column < columns_; ++column) {
                values.push_back(get(row, column));
            }
        }
        return values;
    }

    bool gaps_are_intact() {
        for (std::int64_t row = 0; row < rows_; ++row) {
            for (std::int64_t gap = columns_; gap < stride_; ++gap) {
                if (!std::isnan(get(row, gap))) {
                    return false;
                }
            }
        }
        return true;
    }

    TensorView view() {
        void* data = dtype_ == DType::kFloat32 ? static_cast<void*>(wide_.data()) : narrow_.data();
        TensorView view = contiguous_view(data, dtype_, {rows_, columns_});
        view.stride[0] = stride_;
        return view;
    }

    /// The same memory with other extents.
    TensorView view(std::initializer_list<std::int64_t> shape) {
        return contiguous_view(view().data, dtype_, shape);
    }

 private:
    DType dtype_;
    std::int64_t rows_;
    std::int64_t columns_;
    std::int64_t stride_;
    Guarded<float> wide_;
    Guarded<std::uint16_t> narrow_;
};

/// The message of the InvalidArgument that f throws; empty when it throws none.
template <class F>
std::string refusal(F f) {
    try {
        f();
    } catch (const InvalidArgument& error) {
        return error.what();
    }
    return "";
}

/// Runs f with a number of threads and puts the number back.
template <class F>
void with_threads(int threads, F f) {
    const int before = num_threads();
    set_num_threads(threads);
    f();
    set_num_threads(before);
}

}  // namespace tenp::test
