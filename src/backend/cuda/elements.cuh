// Elements of weights, eight at once, on the GPU: for kernels.cu and groups.cu.

typedef unsigned char u8;
typedef unsigned int u32;

#define FULL_MASK 0xffffffffu

// Elements that are handled at once.
#define ROUND 8

enum Dtype { BF16, F16, F32 };

__device__ __forceinline__ float from_f16(u32 bits) {
    float x;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(bits));
    return x;
}

// The 16-byte words of a round's elements.
template <Dtype D> struct Words {
    static const u32 COUNT = D == F32 ? 2 : 1;
    uint4 word[COUNT];
};

template <Dtype D> __device__ __forceinline__ Words<D> load(const u8* source) {
    Words<D> words;
#pragma unroll
    for (u32 i = 0; i < Words<D>::COUNT; i++) words.word[i] = reinterpret_cast<const uint4*>(source)[i];
    return words;
}

template <Dtype D> __device__ __forceinline__ void decode(const Words<D>& words, float x[ROUND]) {
#pragma unroll
    for (u32 i = 0; i < Words<D>::COUNT; i++) {
        u32 parts[4] = {words.word[i].x, words.word[i].y, words.word[i].z, words.word[i].w};
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            if (D == F32) {
                x[4 * i + k] = __uint_as_float(parts[k]);
            } else if (D == BF16) {
                x[2 * k] = __uint_as_float(parts[k] << 16);
                x[2 * k + 1] = __uint_as_float(parts[k] & 0xffff0000u);
            } else {
                x[2 * k] = from_f16(parts[k] & 0xffffu);
                x[2 * k + 1] = from_f16(parts[k] >> 16);
            }
        }
    }
}

// The largest magnitude so far, as bits: they order as the numbers do, with infinities and NaN above all others. Of 16-bit
// elements the even ones (in the low half) and the odd ones (in the high half) are kept apart.
struct Largest {
    u32 low, high;
};

template <Dtype D> __device__ __forceinline__ void take_in(Largest& largest, const Words<D>& words) {
#pragma unroll
    for (u32 i = 0; i < Words<D>::COUNT; i++) {
        u32 parts[4] = {words.word[i].x, words.word[i].y, words.word[i].z, words.word[i].w};
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            if (D == F32) {
                largest.high = max(largest.high, parts[k] & 0x7fffffffu);
            } else {
                largest.low = max(largest.low, parts[k] & 0x7fffu);
                largest.high = max(largest.high, parts[k] & 0x7fff0000u);
            }
        }
    }
}

// The largest magnitude as an f32's bits.
template <Dtype D> __device__ __forceinline__ u32 magnitude(const Largest& largest) {
    const u32 bits = D == F32 ? largest.high : max(largest.low << 16, largest.high);
    return D == F16 ? __float_as_uint(from_f16(bits >> 16)) : bits;
}
