// How tensor cores add, to the bit, so that what is said of their errors can be tried on the host.
//
// NVIDIA does not say it; experiments found it, and models of it gave a GPU's own bits for all inputs that were tried
// (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330, 2021, for sm_80;
// Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv:2512.07004, and Xie et al., "MMA-Sim",
// arXiv:2511.10909, for sm_80 to sm_120). A step takes the sum so far and `step` exact products. All are aligned to the
// greatest exponent among them, where a product's is the sum of its factors'; what lies more than `fraction` bits below is
// cut off; the rest is added exactly, and the sum is cut off at float32's 24 bits. Nothing is ever rounded up.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace shim {

struct TensorCore {
    int step = 0;  // 0: float32 additions, rounded to nearest, in the order of k
    int fraction = 0;
};

// value = significand 2^(exponent - BITS) with BITS = 7 for bfloat16 and 23 for float32; a zero's exponent never counts.
struct Decoded {
    int32_t significand, exponent;
    bool finite;

    template <int BITS> static Decoded of(float value) {
        constexpr int32_t OF_ZERO = -5000;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        int32_t exponent = bits >> 23 & 255, significand = (bits & 0x7fffff) >> (23 - BITS);
        if (exponent) significand |= 1 << BITS;
        Decoded out{bits >> 31 ? -significand : significand, (exponent ? exponent : 1) - 127, exponent != 255};
        if (!significand) out.exponent = OF_ZERO;
        return out;
    }
};

// sum 2^exponent as float32, towards zero.
inline float truncated(int64_t sum, int exponent) {
    if (!sum) return 0.0f;
    uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
    double value;
    memcpy(&value, &bits, 8);
    value *= static_cast<double>(sum);
    float nearest = static_cast<float>(value);
    return std::fabs(nearest) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

inline void add_products(const TensorCore& core, const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]) {
    if (!core.step) {
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
        return;
    }
    int32_t b_significand[16][8], b_exponent[16][8];
    bool b_finite[8];
    for (int n = 0; n < 8; ++n) {
        b_finite[n] = true;
        for (int k = 0; k < 16; ++k) {
            Decoded one = Decoded::of<7>(b[k][n]);
            b_significand[k][n] = one.significand;
            b_exponent[k][n] = one.exponent;
            b_finite[n] &= one.finite;
        }
    }
    for (int m = 0; m < 16; ++m) {
        Decoded row[16];
        bool finite = true;
        for (int k = 0; k < 16; ++k) {
            row[k] = Decoded::of<7>(a[m][k]);
            finite &= row[k].finite;
        }
        for (int first = 0; first < 16; first += core.step) {
            int32_t greatest[8];
            int64_t sums[8];
            Decoded before[8];
            for (int n = 0; n < 8; ++n) {
                before[n] = Decoded::of<23>(d[m][n]);
                greatest[n] = before[n].exponent;
            }
            for (int k = first; k < first + core.step; ++k)
                for (int n = 0; n < 8; ++n) {
                    int32_t exponent = row[k].exponent + b_exponent[k][n];
                    greatest[n] = greatest[n] < exponent ? exponent : greatest[n];
                }
            // Shifts by 31 bits and more leave nothing.
            for (int n = 0; n < 8; ++n) {
                int32_t by = greatest[n] - before[n].exponent, own = before[n].significand;
                int64_t kept = static_cast<int64_t>(std::abs(own)) << (core.fraction - 23) >> (by < 31 ? by : 31);
                sums[n] = own < 0 ? -kept : kept;
            }
            for (int k = first; k < first + core.step; ++k)
                for (int n = 0; n < 8; ++n) {
                    int32_t product = row[k].significand * b_significand[k][n];
                    int32_t by = greatest[n] - row[k].exponent - b_exponent[k][n];
                    int32_t kept = std::abs(product) << (core.fraction - 14) >> (by < 31 ? by : 31);
                    sums[n] += product < 0 ? -kept : kept;
                }
            for (int n = 0; n < 8; ++n) {
                if (finite && b_finite[n] && before[n].finite) {
                    d[m][n] = truncated(sums[n], greatest[n] - core.fraction);
                } else {
                    for (int k = first; k < first + core.step; ++k) d[m][n] += a[m][k] * b[k][n];
                }
            }
        }
    }
}

}  // namespace shim
