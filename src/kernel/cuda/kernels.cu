// The GPU's kernels: ../scalar.rs and ../nested.rs in CUDA C, byte for byte.
//
// kernels.ptx is made from this file by scripts/build-ptx and committed beside it; users need no compiler. Nothing may be
// contracted or approximated: the compiler runs with --fmad=false, and every rounding that matters is spelled out.

typedef unsigned char u8;
typedef unsigned int u32;

#define FULL_MASK 0xffffffffu

// A block of weights is quantized by a team of 4 threads. Its elements are rows of 32, one for each lane of the figures'
// sums; of every row a thread takes 8 neighbours. So every lane's sum is one thread's, in order, as the scalar kernel has it.
#define ROW 32
#define TEAM 4
#define WIDTH 8
#define TEAMS 32 // in a thread block
#define THREADS (TEAM * TEAMS)

#define ABSMAX_FLOOR 1e-38f

// A codebook, so laid out that an element's rank takes no search; made by tables.rs, which says why it is exact.
struct Table {
    float threshold[32]; // by bin: the threshold in it, or infinity
    u32 base[32];        // by bin: the thresholds below it, but for the extra ones
    float value[16];     // by rank
    u32 code[16];        // by rank
    float extra[2];      // thresholds that share a bin with another one
};

enum Dtype { BF16, F16, F32 };

__device__ __forceinline__ float from_f16(u32 bits) {
    float x;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(bits));
    return x;
}

// The 16-byte words of 8 elements.
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

// The first `count` of 8 elements, and zeros.
template <Dtype D> __device__ __forceinline__ Words<D> load_some(const u8* source, u32 count) {
    u32 parts[WIDTH] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (u32 i = 0; i < WIDTH; i++) {
        if (i >= count) continue;
        if (D == F32) {
            parts[i] = reinterpret_cast<const u32*>(source)[i];
        } else {
            parts[i / 2] |= u32(reinterpret_cast<const unsigned short*>(source)[i]) << (i % 2 * 16);
        }
    }
    Words<D> words;
#pragma unroll
    for (u32 i = 0; i < Words<D>::COUNT; i++)
        words.word[i] = make_uint4(parts[4 * i], parts[4 * i + 1], parts[4 * i + 2], parts[4 * i + 3]);
    return words;
}

template <Dtype D> __device__ __forceinline__ void decode(const Words<D>& words, float x[WIDTH]) {
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

// The largest magnitude of the team, as an f32's bits.
template <Dtype D> __device__ __forceinline__ u32 team_largest(const Largest& largest) {
    u32 bits = D == F32 ? largest.high : max(largest.low << 16, largest.high);
    bits = max(bits, __shfl_xor_sync(FULL_MASK, bits, 1));
    bits = max(bits, __shfl_xor_sync(FULL_MASK, bits, 2));
    return D == F16 ? __float_as_uint(from_f16(bits >> 16)) : bits;
}

// Sums of a thread's 8 lanes.
struct Sums {
    float signal[WIDTH], noise[WIDTH], worst;
};

// The codes of 8 scaled elements: 4 bytes, the even element's code in the high nibble.
template <bool FP4> __device__ __forceinline__ u32 encode(const float t[WIDTH], const Table& table, Sums& sums) {
    u32 packed = 0;
#pragma unroll
    for (u32 i = 0; i < WIDTH; i++) {
        // Adding 2^23 + 16 leaves a bin's number in the lowest bits: 15.49 t, rounded, from 0 to 31.
        u32 bin = __float_as_uint(__fmaf_rn(t[i], 15.49f, 8388624.0f)) & 31;
        u32 rank = table.base[bin] + (t[i] > table.threshold[bin]);
        if (FP4) rank += (t[i] > table.extra[0]) + (t[i] > table.extra[1]);
        float error = __fsub_rn(t[i], table.value[rank]);
        u32 code = FP4 ? table.code[rank] : rank;
        packed |= code << (i / 2 * 8 + (i % 2 ? 0 : 4));
        sums.signal[i] = __fmaf_rn(t[i], t[i], sums.signal[i]);
        sums.noise[i] = __fmaf_rn(error, error, sums.noise[i]);
        sums.worst = fmaxf(sums.worst, fabsf(error));
    }
    return packed;
}

// The 32 lanes of a team, added as the scalar kernel does; valid in the team's first thread.
__device__ __forceinline__ float tree_sum(const float lanes[WIDTH]) {
    float sums[WIDTH / 2];
#pragma unroll
    for (u32 i = 0; i < WIDTH / 2; i++) {
        sums[i] = __fadd_rn(lanes[2 * i], lanes[2 * i + 1]);
        sums[i] = __fadd_rn(sums[i], __shfl_down_sync(FULL_MASK, sums[i], 2, TEAM));
        sums[i] = __fadd_rn(sums[i], __shfl_down_sync(FULL_MASK, sums[i], 1, TEAM));
    }
    return __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
}

// Quantizes `elements` elements in blocks of `block_size`; only the last block may be short. `source` and `packed` start at
// multiples of 16 bytes. A NaN or an infinity shows as such in its block's absmax; that block's other results mean nothing.
template <Dtype D, bool FP4>
__device__ __forceinline__ void quantize(const u8* source, u32 elements, u32 block_size, const Table* tables, u8* packed,
                                         float* absmax, float* signal, float* noise, float* worst) {
    __shared__ Table table;
    for (u32 i = threadIdx.x; i < sizeof(Table) / 4; i += THREADS)
        reinterpret_cast<u32*>(&table)[i] = reinterpret_cast<const u32*>(tables)[i];
    __syncthreads();

    // Threads past the last block go through it with nothing in hand, since shuffles need whole warps.
    const size_t block = size_t(blockIdx.x) * TEAMS + threadIdx.x / TEAM;
    const size_t first = block * block_size;
    const u32 left = first < elements ? u32(elements - first) : 0;
    const u32 count = min(left, block_size);
    const u32 rows = count / ROW;
    const u32 lane = threadIdx.x % TEAM * WIDTH;
    const u32 rest = count % ROW > lane ? min(count % ROW - lane, WIDTH) : 0;
    const size_t element = D == F32 ? 4 : 2;
    source += (first + lane) * element;
    packed += (first + lane) / 2;

    Largest largest = {0, 0};
    for (u32 row = 0; row < rows; row++) take_in<D>(largest, load<D>(source + row * ROW * element));
    if (rest) take_in<D>(largest, load_some<D>(source + rows * ROW * element, rest));
    const float most = __uint_as_float(team_largest<D>(largest));
    const float divisor = fmaxf(most, ABSMAX_FLOOR);

    Sums sums = {};
    float x[WIDTH];
    if (count == block_size) {
        const float reciprocal = __frcp_rn(divisor);
#pragma unroll 1
        for (u32 row = 0; row < rows; row++) {
            decode<D>(load<D>(source + row * ROW * element), x);
#pragma unroll
            for (u32 i = 0; i < WIDTH; i++) x[i] = __fmul_rn(x[i], reciprocal);
            *reinterpret_cast<u32*>(packed + row * ROW / 2) = encode<FP4>(x, table, sums);
        }
    } else if (count > 0) {
        // The short last block is divided, not multiplied. What pads its last row is zero, and adds nothing to the sums.
#pragma unroll 1
        for (u32 row = 0; row <= rows; row++) {
            const u32 here = row < rows ? WIDTH : rest;
            decode<D>(load_some<D>(source + row * ROW * element, here), x);
#pragma unroll
            for (u32 i = 0; i < WIDTH; i++) x[i] = __fdiv_rn(x[i], divisor);
            const u32 codes = encode<FP4>(x, table, sums);
#pragma unroll
            for (u32 i = 0; i < WIDTH / 2; i++)
                if (2 * i < here) packed[row * ROW / 2 + i] = u8(codes >> (8 * i));
        }
    }

    const float signal_sum = tree_sum(sums.signal), noise_sum = tree_sum(sums.noise);
    sums.worst = fmaxf(sums.worst, __shfl_xor_sync(FULL_MASK, sums.worst, 1));
    sums.worst = fmaxf(sums.worst, __shfl_xor_sync(FULL_MASK, sums.worst, 2));
    if (lane == 0 && count > 0) {
        absmax[block] = count == block_size ? most : isnan(most) ? most : divisor;
        signal[block] = signal_sum;
        noise[block] = noise_sum;
        worst[block] = sums.worst;
    }
}

#define QUANTIZE(name, dtype, fp4)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
    name(const u8* __restrict__ source, u32 elements, u32 block_size, const Table* __restrict__ table,                     \
         u8* __restrict__ packed, float* __restrict__ absmax, float* __restrict__ signal, float* __restrict__ noise,       \
         float* __restrict__ worst) {                                                                                      \
        quantize<dtype, fp4>(source, elements, block_size, table, packed, absmax, signal, noise, worst);                   \
    }

QUANTIZE(quantize_nf4_bf16, BF16, false)
QUANTIZE(quantize_nf4_f16, F16, false)
QUANTIZE(quantize_nf4_f32, F32, false)
QUANTIZE(quantize_fp4_bf16, BF16, true)
QUANTIZE(quantize_fp4_f16, F16, true)
QUANTIZE(quantize_fp4_f32, F32, true)

#define NESTED_BLOCK 256

// Double quantization: `count` absmax, less `offset`, in blocks of 256, one for each thread block. `midpoints` are the 255
// between neighbours of the dynamic map.
extern "C" __global__ void __launch_bounds__(NESTED_BLOCK)
quantize_absmax(const float* __restrict__ absmax, u32 count, float offset, const float* __restrict__ midpoints,
                u8* __restrict__ codes, float* __restrict__ nested_absmax) {
    __shared__ float midpoint[NESTED_BLOCK - 1];
    __shared__ u32 warp_largest[NESTED_BLOCK / 32];
    const u32 i = blockIdx.x * NESTED_BLOCK + threadIdx.x;
    if (threadIdx.x < NESTED_BLOCK - 1) midpoint[threadIdx.x] = midpoints[threadIdx.x];

    const float x = i < count ? __fsub_rn(absmax[i], offset) : 0.0f;
    u32 largest = __float_as_uint(fabsf(x));
    for (u32 step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, step));
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
    __syncthreads();
    largest = warp_largest[threadIdx.x % 8];
    for (u32 step = 4; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(FULL_MASK, largest, step));

    const float most = __uint_as_float(largest);
    const float reciprocal = most > 0.0f ? fminf(__frcp_rn(most), 3.402823466e38f) : 0.0f;
    const float y = __fmul_rn(x, reciprocal);
    // How many midpoints y is greater than.
    u32 code = 0;
    for (u32 step = 128; step > 0; step /= 2)
        if (y > midpoint[code + step - 1]) code += step;
    if (i < count) codes[i] = u8(code);
    if (threadIdx.x == 0) nested_absmax[blockIdx.x] = most;
}
