// Group quantization on the GPU: ../group/scalar.rs in CUDA C, byte for byte; names and rules are explained there.
//
// groups.ptx is made from this file as kernels.ptx is from kernels.cu, and the same holds of its arithmetic.

#include "elements.cuh"

#define THREADS 128

enum Scheme { INT4, INT4_ASYM, NVFP4, MODELOPT, MXFP4 };

// What a kernel is given: `groups` groups of `size` elements. `factor` is NVFP4's global_scale or ModelOpt's scale_2. All
// but `source` start at multiples of 4. `figures` are the groups' scales, then their signal, noise and worst.
struct Groups {
    const u8* source;
    u32 groups, size;
    float factor;
    u8 *packed, *scales, *zero_points;
    float* figures;
};

__device__ __forceinline__ u32 to_f16(float x) {
    u32 bits;
    asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h; }" : "=r"(bits) : "f"(x));
    return bits;
}

// Rounded to the source's dtype, ties to even.
template <Dtype D> __device__ __forceinline__ float rounded(float x) {
    const u32 bits = __float_as_uint(x);
    if (D == BF16) return __uint_as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
    if (D == F16) return from_f16(to_f16(x));
    return x;
}

// What a group's scale is chosen by: the largest magnitude's bits and, for zero points, the least and the greatest element.
struct Extent {
    u32 largest;
    float least, greatest;
};

__device__ __forceinline__ void take_in(Extent& extent, float x) {
    extent.largest = max(extent.largest, __float_as_uint(fabsf(x)));
    extent.least = fminf(extent.least, x);
    extent.greatest = fmaxf(extent.greatest, x);
}

// That of all threads of a team.
template <Scheme S, u32 TEAM> __device__ __forceinline__ Extent of_team(Extent extent) {
#pragma unroll
    for (u32 step = TEAM / 2; step > 0; step /= 2) {
        extent.largest = max(extent.largest, __shfl_xor_sync(FULL_MASK, extent.largest, step));
        if (S != INT4_ASYM) continue;
        extent.least = fminf(extent.least, __shfl_xor_sync(FULL_MASK, extent.least, step));
        extent.greatest = fmaxf(extent.greatest, __shfl_xor_sync(FULL_MASK, extent.greatest, step));
    }
    return extent;
}

struct Chosen {
    u32 stored; // the scale, as it is stored
    float scale;
    float inverse; // of a power of two: exact, and times it is over the scale
    float zero_point;
};

// The nearest E4M3 float to a number from 0 to 448, ties to even.
__device__ __forceinline__ u32 e4m3(float x) {
    if (x < 0.015625f) return u32(__float2int_rn(__fmul_rn(x, 512.0f))); // subnormal
    const u32 bits = __float_as_uint(x);
    return ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
}

__device__ __forceinline__ float e4m3_value(u32 byte) {
    return byte < 8 ? __fmul_rn(float(byte), 0.001953125f) : __uint_as_float((byte << 20) + (120 << 23));
}

// A scale of 0 would divide by it: the dtype's epsilon in its place.
template <Dtype D> __device__ __forceinline__ void take_scale(Chosen& chosen, float scale) {
    const float epsilon = D == BF16 ? 0.0078125f : D == F16 ? 0.0009765625f : 1.1920929e-7f;
    chosen.scale = scale == 0.0f ? epsilon : scale;
    const u32 bits = __float_as_uint(chosen.scale);
    chosen.stored = D == BF16 ? bits >> 16 : D == F16 ? to_f16(chosen.scale) : bits;
}

template <Dtype D, Scheme S> __device__ __forceinline__ Chosen choose(const Extent& extent, float factor) {
    Chosen chosen = {};
    const float absmax = __uint_as_float(extent.largest);
    if (S == INT4) take_scale<D>(chosen, rounded<D>(__fdiv_rn(absmax, 7.5f)));
    if (S == INT4_ASYM) {
        const float scale = rounded<D>(__fdiv_rn(rounded<D>(__fsub_rn(extent.greatest, extent.least)), 15.0f));
        const float ratio = __fdiv_rn(extent.least, scale);
        const float point = rintf(fminf(fmaxf(rounded<D>(__fsub_rn(-8.0f, rounded<D>(ratio))), -8.0f), 7.0f));
        chosen.zero_point = isnan(ratio) ? 0.0f : point;
        take_scale<D>(chosen, scale);
    }
    if (S == NVFP4) {
        const u32 byte = e4m3(fminf(__fmul_rn(factor, rounded<D>(__fdiv_rn(absmax, 6.0f))), 448.0f));
        chosen.stored = byte == 0 ? 32 : byte; // 0.125 for 0
        chosen.scale = __fdiv_rn(e4m3_value(chosen.stored), factor);
    }
    if (S == MODELOPT) {
        const float wanted = __fdiv_rn(absmax, __fmul_rn(6.0f, factor));
        chosen.stored = e4m3(wanted == 0.0f ? 1.0f : fminf(fmaxf(wanted, 0.001953125f), 448.0f));
        chosen.scale = __fmul_rn(e4m3_value(chosen.stored), factor);
    }
    if (S == MXFP4) {
        const u32 exponent = (extent.largest + (1 << 21)) >> 23;
        chosen.stored = max(exponent, 2) - 2;
        chosen.scale = __uint_as_float(chosen.stored == 0 ? 1 << 22 : chosen.stored << 23);
        chosen.inverse = __uint_as_float((254 - chosen.stored) << 23);
    }
    return chosen;
}

// The code of an element, which is `t` times the scale, and the value that it stands for in units of the scale.
template <Dtype D, Scheme S> __device__ __forceinline__ u32 encode(float t, const Chosen& chosen, float& value) {
    if (S == INT4 || S == INT4_ASYM) {
        float shifted = rounded<D>(t);
        if (S == INT4_ASYM) shifted = rounded<D>(__fadd_rn(shifted, chosen.zero_point));
        // The last place of 1.5 * 2^23 is 1: adding it, and 8, rounds to an integer and leaves the code in the lowest bits.
        const float sum = __fadd_rn(fminf(fmaxf(shifted, -8.0f), 7.0f), 12582920.0f);
        value = __fsub_rn(sum, 12582920.0f);
        if (S == INT4_ASYM) value = __fsub_rn(value, chosen.zero_point);
        return __float_as_uint(sum) & 15;
    }
    const float wanted = S == MXFP4 ? rounded<D>(t) : t;
    // Where nothing is left of a scale times scale_2, zeros are NaN here, and their code is 0.
    const float magnitude = fminf(S == MODELOPT && isnan(wanted) ? 0.0f : fabsf(wanted), 6.0f);
    // E2M1 floats are 0.5 apart up to 2, and twice as much from 2 and from 4 on: the last place of 2^22, 2^23 and 2^24.
    const u32 doublings = max(__float_as_uint(magnitude) >> 23, 127) - 127;
    const float large = __uint_as_float((doublings + 127 + 22) << 23);
    const float sum = __fadd_rn(magnitude, large);
    value = __fsub_rn(sum, large);
    const u32 code = __float_as_uint(sum) - __float_as_uint(large) + 2 * doublings;
    if (!(wanted < 0.0f)) return code;
    value = -value;
    return code | 8;
}

// The figures' sums over `LANES` lanes.
template <u32 LANES> struct Sums {
    float signal[LANES], noise[LANES], worst;
};

// Takes an element in; gives its code.
template <Dtype D, Scheme S, u32 LANES>
__device__ __forceinline__ u32 take_in(Sums<LANES>& sums, u32 lane, float x, const Chosen& chosen) {
    const float t = S == MXFP4 ? __fmul_rn(x, chosen.inverse) : __fdiv_rn(x, chosen.scale);
    float value;
    const u32 code = encode<D, S>(t, chosen, value);
    const float error = __fsub_rn(t, value);
    sums.signal[lane] = __fmaf_rn(t, t, sums.signal[lane]);
    sums.noise[lane] = __fmaf_rn(error, error, sums.noise[lane]);
    sums.worst = fmaxf(sums.worst, fabsf(error));
    return code;
}

// What is written once a group. A group with a NaN or an infinity shows by NaN for a scale; nothing else is promised of it.
template <Dtype D, Scheme S>
__device__ __forceinline__ void write_scale(const Groups& g, u32 group, const Chosen& chosen, const Extent& extent) {
    if (S == INT4_ASYM) g.zero_points[group] = u8(int(chosen.zero_point) + 8);
    if (S >= NVFP4) {
        g.scales[group] = u8(chosen.stored);
    } else if (D == F32) {
        reinterpret_cast<u32*>(g.scales)[group] = chosen.stored;
    } else {
        reinterpret_cast<unsigned short*>(g.scales)[group] = chosen.stored;
    }
    g.figures[group] = extent.largest < 0x7f800000 ? chosen.scale : __uint_as_float(0x7fffffff);
}

// A group is quantized by a team of threads, of 4, or of 2 where it is 16 elements. Its elements are rows of 8 for each
// thread, which are that thread's lanes of the figures' sums. `source` starts at a multiple of 16.
template <Dtype D, Scheme S, u32 TEAM> __device__ __forceinline__ void quantize_groups(const Groups& g) {
    const u32 element = D == F32 ? 4 : 2, row = TEAM * ROUND;
    const u32 member = threadIdx.x % TEAM;
    const u32 mine = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
    // Threads past the last group go through it too, since shuffles need whole warps.
    const bool is_there = mine < g.groups;
    const u32 group = is_there ? mine : g.groups - 1;
    const u32 size = S >= NVFP4 ? row : g.size, rows = size / row;
    const size_t first = size_t(group) * size + member * ROUND;
    const u8* source = g.source + first * element;

    Largest largest = {0, 0};
    Extent extent = {0, 0.0f, 0.0f};
    float x[ROUND];
#pragma unroll 4
    for (u32 i = 0; i < rows; i++) {
        const Words<D> words = load<D>(source + i * row * element);
        if (S != INT4_ASYM) {
            take_in<D>(largest, words);
            continue;
        }
        decode<D>(words, x);
#pragma unroll
        for (u32 k = 0; k < ROUND; k++) take_in(extent, x[k]);
    }
    if (S != INT4_ASYM) extent.largest = magnitude<D>(largest);
    extent = of_team<S, TEAM>(extent);
    const Chosen chosen = choose<D, S>(extent, g.factor);

    Sums<ROUND> sums = {};
#pragma unroll 1
    for (u32 i = 0; i < rows; i++) {
        decode<D>(load<D>(source + i * row * element), x);
        u32 codes = 0;
#pragma unroll
        for (u32 k = 0; k < ROUND; k++) codes |= take_in<D, S>(sums, k, x[k], chosen) << 4 * k;
        if (is_there) *reinterpret_cast<u32*>(g.packed + (first + i * row) / 2) = codes;
    }

    const bool upper = member >= TEAM / 2;
    float kept[ROUND / 2];
#pragma unroll
    for (u32 i = 0; i < ROUND / 2; i++) {
        const float signal = __fadd_rn(sums.signal[2 * i], sums.signal[2 * i + 1]);
        const float noise = __fadd_rn(sums.noise[2 * i], sums.noise[2 * i + 1]);
        // Each half of the team gives the other what that one sums.
        kept[i] = __fadd_rn(upper ? noise : signal, __shfl_xor_sync(FULL_MASK, upper ? signal : noise, TEAM / 2));
        if (TEAM == 4) kept[i] = __fadd_rn(kept[i], __shfl_xor_sync(FULL_MASK, kept[i], 1));
    }
    const float sum = __fadd_rn(__fadd_rn(kept[0], kept[2]), __fadd_rn(kept[1], kept[3]));
    float worst = sums.worst;
#pragma unroll
    for (u32 step = TEAM / 2; step > 0; step /= 2) worst = fmaxf(worst, __shfl_xor_sync(FULL_MASK, worst, step));
    if (!is_there) return;
    if (member == 0) {
        write_scale<D, S>(g, group, chosen, extent);
        g.figures[g.groups + group] = sum;
    } else if (member == TEAM / 2) {
        g.figures[2 * size_t(g.groups) + group] = sum;
        g.figures[3 * size_t(g.groups) + group] = worst;
    }
}

// Elements of a row that a thread loads before it needs the first.
#define AT_ONCE 4

template <Dtype D> __device__ __forceinline__ float load_one(const u8* source, size_t i) {
    if (D == F32) return reinterpret_cast<const float*>(source)[i];
    const u32 bits = reinterpret_cast<const unsigned short*>(source)[i];
    return D == BF16 ? __uint_as_float(bits << 16) : from_f16(bits);
}

template <Dtype D> __device__ __forceinline__ void load_some(const u8* source, size_t i, float x[AT_ONCE]) {
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) x[k] = load_one<D>(source, i + 32 * k);
}

// A group that is a whole row, of any length, is quantized by a warp: each of its threads is a lane of the figures' sums.
// `source` starts at a multiple of an element.
template <Dtype D, Scheme S> __device__ __forceinline__ void quantize_rows(const Groups& g) {
    const u32 lane = threadIdx.x % 32;
    const u32 group = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (group >= g.groups) return;
    const u8* source = g.source + size_t(group) * g.size * (D == F32 ? 4 : 2);
    u32* packed = reinterpret_cast<u32*>(g.packed) + group * size_t((g.size + 7) / 8);
    float x[AT_ONCE];

    Extent extent = {0, 0.0f, 0.0f};
    u32 at = 0;
    for (; at + 32 * AT_ONCE <= g.size; at += 32 * AT_ONCE) {
        load_some<D>(source, at + lane, x);
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) take_in(extent, x[k]);
    }
#pragma unroll 1
    for (at += lane; at < g.size; at += 32) take_in(extent, load_one<D>(source, at));
    extent = of_team<S, 32>(extent);
    const Chosen chosen = choose<D, S>(extent, g.factor);

    Sums<1> sums = {};
    const auto quantize = [&](u32 i, float x, bool is_there) {
        u32 codes = take_in<D, S>(sums, 0, x, chosen) << 4 * (lane % 8);
        if (!is_there) codes = 0;
#pragma unroll
        for (u32 step = 1; step < 8; step *= 2) codes |= __shfl_xor_sync(FULL_MASK, codes, step);
        if (is_there && lane % 8 == 0) packed[i / 8] = codes;
    };
    for (at = 0; at + 32 * AT_ONCE <= g.size; at += 32 * AT_ONCE) {
        load_some<D>(source, at + lane, x);
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) quantize(at + lane + 32 * k, x[k], true);
    }
    // What there isn't is zero, and adds nothing to the sums.
#pragma unroll 1
    for (; at < g.size; at += 32) {
        const bool is_there = at + lane < g.size;
        quantize(at + lane, is_there ? load_one<D>(source, at + lane) : 0.0f, is_there);
    }

    float signal = sums.signal[0], noise = sums.noise[0], worst = sums.worst;
    // Neighbours first, then the upper half onto the lower.
    const u32 steps[5] = {1, 16, 8, 4, 2};
#pragma unroll
    for (u32 i = 0; i < 5; i++) {
        signal = __fadd_rn(signal, __shfl_xor_sync(FULL_MASK, signal, steps[i]));
        noise = __fadd_rn(noise, __shfl_xor_sync(FULL_MASK, noise, steps[i]));
        worst = fmaxf(worst, __shfl_xor_sync(FULL_MASK, worst, steps[i]));
    }
    if (lane != 0) return;
    write_scale<D, S>(g, group, chosen, extent);
    g.figures[g.groups + group] = signal;
    g.figures[2 * size_t(g.groups) + group] = noise;
    g.figures[3 * size_t(g.groups) + group] = worst;
}

#define KERNEL(name, quantize)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                   \
    name(const u8* __restrict__ source, u32 groups, u32 size, float factor, u8* __restrict__ packed,                       \
         u8* __restrict__ scales, u8* __restrict__ zero_points, float* __restrict__ figures) {                             \
        const Groups g = {source, groups, size, factor, packed, scales, zero_points, figures};                             \
        quantize(g);                                                                                                       \
    }

#define KERNELS(dtype, name)                                                                                               \
    KERNEL(quantize_int4_##name, (quantize_groups<dtype, INT4, 4>))                                                        \
    KERNEL(quantize_int4_asym_##name, (quantize_groups<dtype, INT4_ASYM, 4>))                                              \
    KERNEL(quantize_nvfp4_##name, (quantize_groups<dtype, NVFP4, 2>))                                                      \
    KERNEL(quantize_nvfp4_modelopt_##name, (quantize_groups<dtype, MODELOPT, 2>))                                          \
    KERNEL(quantize_mxfp4_##name, (quantize_groups<dtype, MXFP4, 4>))                                                      \
    KERNEL(quantize_int4_rows_##name, (quantize_rows<dtype, INT4>))                                                        \
    KERNEL(quantize_int4_asym_rows_##name, (quantize_rows<dtype, INT4_ASYM>))

KERNELS(BF16, bf16)
KERNELS(F16, f16)
KERNELS(F32, f32)

// The largest magnitude among `rounds` times 8 elements, as an f32's bits: one for each thread block. `source` starts at a multiple of 16.
template <Dtype D> __device__ __forceinline__ void find_largest(const u8* source, u32 rounds, u32* largest) {
    __shared__ u32 warp_largest[THREADS / 32];
    Largest mine = {0, 0};
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < rounds; i += gridDim.x * THREADS)
        take_in<D>(mine, load<D>(source + size_t(i) * ROUND * (D == F32 ? 4 : 2)));
    u32 bits = magnitude<D>(mine);
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(FULL_MASK, bits, step));
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = bits;
    __syncthreads();
    if (threadIdx.x != 0) return;
#pragma unroll
    for (u32 warp = 1; warp < THREADS / 32; warp++) bits = max(bits, warp_largest[warp]);
    largest[blockIdx.x] = bits;
}

#define LARGEST(dtype, name)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                   \
    largest_##name(const u8* __restrict__ source, u32 rounds, u32* __restrict__ largest) {                                 \
        find_largest<dtype>(source, rounds, largest);                                                                      \
    }

LARGEST(BF16, bf16)
LARGEST(F16, f16)
LARGEST(F32, f32)
