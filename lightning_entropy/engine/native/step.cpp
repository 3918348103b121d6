// An inner step of every parameter, in one pass over memory and one call. step.py builds it and has the reasons.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t TILE = 1024;          // weights whose noise is drawn at once: it stays in the first cache
constexpr int64_t ALONE = 1 << 15;      // weights below which a second thread costs more than it saves

// step.py's _PARAMETER. Arrays that are not there are null; key is read where noise is not 0.
struct Parameter {
    float *y;
    const float *x;
    float *z, *m;
    const float *g;
    int64_t size;
    float lr, weight_decay, momentum, nesterov, pull, noise;
    uint32_t key[2];
};
static_assert(sizeof(Parameter) == 80, "as step.py packs it");

// A hash of 32 bits with a key in each of its first two rounds (Wellons, hash prospector, "lowbias32").
inline uint32_t hash(uint32_t h, const uint32_t *key) {
    h = (h ^ key[0]) * 0x7FEB352Du;
    h = ((h ^ (h >> 16)) + key[1]) * 0x846CA68Bu;
    h = (h ^ (h >> 15)) * 0x9E3779B1u;
    return h ^ (h >> 16);
}

inline int32_t bits(float v) {
    int32_t b;
    std::memcpy(&b, &v, 4);
    return b;
}

inline float number(int32_t b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
}

// The C library's logarithm, cosine and sine are calls in the middle of the loop. These polynomials interpolate at
// Chebyshev's points: log u to 3e-7 of itself for u normal and > 0, the cosine and sine of pi/4 v to 2e-7 in [-1, 1].
inline float logarithm(float u) {
    // u = 2^e (1 + v) with 1 + v in [sqrt(1/2), sqrt(2)), whose bits begin at 0x3F3504F3.
    const int32_t b = bits(u) - 0x3F3504F3;
    const float v = number((b & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
    float p = -0.098953608f * v + 0.16126265f;
    p = p * v - 0.17278211f;
    p = p * v + 0.19913346f;
    p = p * v - 0.24968907f;
    p = p * v + 0.33334607f;
    p = p * v - 0.50000376f;
    p = p * v + 0.99999994f;
    return static_cast<float>(b >> 23) * 0.69314718f + p * v;
}

inline float octant_cosine(float a) {
    const float q = a * a;
    return ((-0.0013585779f * q + 0.041655015f) * q - 0.49999856f) * q + 1.0f;
}

inline float octant_sine(float a) {
    const float q = a * a;
    return (((-0.00019503904f * q + 0.008332036f) * q - 0.16666651f) * q + 1.0f) * a;
}

// Fill out[0, 2 pairs) with independent numbers N(0, 1), functions of the pairs' positions and the key. Box and
// Muller's transform (1958) of two hashed positions: one is the radius, r = sqrt(-2 log u), the other the angle, as an
// octant's angle of 30 bits, a swap and a sign. Within +-5.9.
inline void draw(int64_t first, int64_t pairs, const uint32_t *key, float *__restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
        const uint32_t position = 2 * static_cast<uint32_t>(first + i);
        const uint32_t a = hash(position, key), b = hash(position + 1, key);
        const float u = static_cast<float>(static_cast<int32_t>(a >> 8)) * 0x1p-24f + 0x1p-25f;
        const float radius = std::sqrt(-2.0f * logarithm(u));
        const float angle = static_cast<float>(static_cast<int32_t>(b) >> 2) * (0x1p-29f * 0.78539816f);
        const float cosine = b & 1 ? -octant_cosine(angle) : octant_cosine(angle), sine = octant_sine(angle);
        out[i] = radius * (b & 2 ? sine : cosine);
        out[pairs + i] = radius * (b & 2 ? cosine : sine);
    }
}

// Weights [from, to) of one parameter, at most TILE of them.
template <bool DESCEND, bool MOMENTUM, bool MEAN, bool NOISE>
void advance(const Parameter &p, int64_t from, int64_t to, float average) {
    float normal[TILE];
    if constexpr (NOISE) draw(from / 2, (to - from + 1) / 2, p.key, normal);
    float *__restrict y = p.y + from;
    float *__restrict z = MEAN ? p.z + from : nullptr;
    float *__restrict m = MOMENTUM ? p.m + from : nullptr;
    const float *__restrict x = p.x + from;
    const float *__restrict g = DESCEND ? p.g + from : nullptr;
    const float lr = p.lr, weight_decay = p.weight_decay, momentum = p.momentum, pull = p.pull, noise = p.noise;
    const bool nesterov = p.nesterov != 0;
#pragma omp simd
    for (int64_t i = 0; i < to - from; ++i) {
        float value = y[i];
        if constexpr (DESCEND) {  // torch.optim.SGD
            float direction = g[i] + weight_decay * value;
            if constexpr (MOMENTUM) {
                const float new_momentum = momentum * m[i] + direction;
                m[i] = new_momentum;
                direction = nesterov ? direction + momentum * new_momentum : new_momentum;
            }
            value -= lr * direction;
        }
        value += pull * (x[i] - value);
        if constexpr (NOISE) value += noise * normal[i];
        y[i] = value;
        if constexpr (MEAN) z[i] += average * (value - z[i]);
    }
}

using Advance = void (*)(const Parameter &, int64_t, int64_t, float);

template <bool MEAN, bool NOISE>
Advance choose(const Parameter &p) {
    if (p.g == nullptr) return advance<false, false, MEAN, NOISE>;
    return p.m == nullptr ? advance<true, false, MEAN, NOISE> : advance<true, true, MEAN, NOISE>;
}

Advance choose(const Parameter &p) {
    if (p.noise != 0) return p.z == nullptr ? choose<false, true>(p) : choose<true, true>(p);
    return p.z == nullptr ? choose<false, false>(p) : choose<true, false>(p);
}

inline int64_t tiles(const Parameter &p) { return (p.size + TILE - 1) / TILE; }

// The tiles [begin, end) of all parameters, counted through.
void range(const Parameter *params, int64_t count, float average, int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < count && first < end; first += tiles(params[i++])) {
        const Parameter &p = params[i];
        const int64_t last = first + tiles(p);
        if (last <= begin) continue;
        const Advance step = choose(p);
        for (int64_t tile = begin > first ? begin - first : 0; tile < (end < last ? end : last) - first; ++tile) {
            const int64_t from = tile * TILE, to = from + TILE;
            step(p, from, to < p.size ? to : p.size, average);
        }
    }
}

}  // namespace

extern "C" void inner_step(const Parameter *params, int64_t count, float average, int threads) {
    int64_t total = 0, weights = 0;
    for (int64_t i = 0; i < count; ++i) total += tiles(params[i]), weights += params[i].size;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (weights >= ALONE)
    {
        const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
        range(params, count, average, total * rank / team, total * (rank + 1) / team);
    }
#else
    range(params, count, average, 0, total);
#endif
}

// For the tests of its law: the noise of a parameter of this size, which is even.
extern "C" void normals(int64_t size, const uint32_t *key, float *out) {
    for (int64_t from = 0; from < size; from += TILE) {
        draw(from / 2, (size < from + TILE ? size - from : TILE) / 2, key, out + from);
    }
}

// For the tests: the polynomials, elementwise.
extern "C" void logarithms(int64_t size, const float *u, float *out) {
    for (int64_t i = 0; i < size; ++i) out[i] = logarithm(u[i]);
}

extern "C" void octants(int64_t size, const float *v, float *cosine, float *sine) {
    for (int64_t i = 0; i < size; ++i) {
        cosine[i] = octant_cosine(v[i] * 0.78539816f);
        sine[i] = octant_sine(v[i] * 0.78539816f);
    }
}
