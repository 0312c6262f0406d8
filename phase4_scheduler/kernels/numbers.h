// Numbers as the engine keeps them, and as these loops compute with them: float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

static inline float wide(float x) { return x; }

static inline float wide(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

template <class T> static inline T narrow(float x);

template <> inline float narrow<float>(float x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
template <> inline bf16 narrow<bf16>(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x != x ? 0x7fc0 : rounded)};
}

// e^x within 2e-7 of it, in a form that a compiler vectorises: 2^n times a polynomial in the rest (Cephes' expf, by
// Stephen L. Moshier). What would be less than 1e-37 is 0, and more than 1e38 is infinite.
static inline float exponential(float given) {
    const float x = given < -86.0f ? -86.0f : given > 88.0f ? 88.0f : given;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum has no fraction
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t power = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return given < -86.0f ? 0.0f : given > 88.0f ? INFINITY : p * scale;
}
