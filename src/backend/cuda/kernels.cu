// The GPU's kernels: ../scalar.rs and ../nested.rs in CUDA C, byte for byte.
//
// kernels.ptx is made from this file by scripts/build-ptx and committed beside it; users need no compiler. Nothing may be
// contracted or approximated: the compiler runs with --fmad=false, and every rounding that matters is spelled out.

#include "elements.cuh"

// A block of weights is quantized by a team of 2 threads. Its elements are rows of 32, one for each lane of the figures'
// sums; of every row a thread takes 16 neighbours. So every lane's sum is one thread's, in order, as the scalar kernel has it.
#define ROW 32
#define TEAM 2
#define WIDTH 16
#define TEAMS 64 // in a thread block
#define THREADS (TEAM * TEAMS)

#define ABSMAX_FLOOR 1e-38f

// A codebook, so laid out that an element's rank takes no search; made by tables.rs, which says why it is exact.
struct Table {
    float threshold[32]; // by bin: the threshold in it, or infinity
    u32 base[32];        // by bin: 4 times the number of thresholds below it, but for the extra ones
    float value[16];     // by rank
    u32 code[16];        // by rank: 4 times the code
    float extra[2];      // thresholds that share a bin with another one
};

// The first `count` elements of a round, and zeros.
template <Dtype D> __device__ __forceinline__ Words<D> load_some(const u8* source, u32 count) {
    u32 parts[ROUND] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (u32 i = 0; i < ROUND; i++) {
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

// The largest magnitude of the team, as an f32's bits.
template <Dtype D> __device__ __forceinline__ u32 team_largest(const Largest& largest) {
    u32 bits = D == F32 ? largest.high : max(largest.low << 16, largest.high);
    bits = max(bits, __shfl_xor_sync(FULL_MASK, bits, 1));
    return D == F16 ? __float_as_uint(from_f16(bits >> 16)) : bits;
}

// Sums of a thread's lanes.
struct Sums {
    float signal[WIDTH], noise[WIDTH], worst;
};

// What code `index` of the table stands for, given 4 times the index.
template <typename T> __device__ __forceinline__ T entry(const T* table, u32 offset) {
    return *reinterpret_cast<const T*>(reinterpret_cast<const u8*>(table) + offset);
}

// The codes of a round's scaled elements: 4 bytes, the even element's code in the high nibble. `lane` is the first one's.
template <bool FP4>
__device__ __forceinline__ u32 encode(const float t[ROUND], u32 lane, const Table& table, Sums& sums) {
    u32 codes[ROUND];
#pragma unroll
    for (u32 i = 0; i < ROUND; i++) {
        // Adding 2^21 + 16 leaves 4 times the number of a bin in bits 2 to 6: that of 15.49 t + 16, rounded down.
        const u32 bin = __float_as_uint(__fmaf_rn(t[i], 15.49f, 2097168.0f)) & 124;
        u32 rank = entry(table.base, bin);
        if (t[i] > entry(table.threshold, bin)) rank += 4;
        if (FP4 && t[i] > table.extra[0]) rank += 4;
        if (FP4 && t[i] > table.extra[1]) rank += 4;
        const float error = __fsub_rn(t[i], entry(table.value, rank));
        codes[i] = FP4 ? entry(table.code, rank) : rank;
        sums.signal[lane + i] = __fmaf_rn(t[i], t[i], sums.signal[lane + i]);
        sums.noise[lane + i] = __fmaf_rn(error, error, sums.noise[lane + i]);
        sums.worst = fmaxf(sums.worst, fabsf(error));
    }
    // Codes are held times 4, so that four of them fit in 18 bits; the first element's is the second nibble from below.
    const u32 low = ((codes[2] * 16 + codes[3]) * 16 + codes[0]) * 16 + codes[1];
    const u32 high = ((codes[6] * 16 + codes[7]) * 16 + codes[4]) * 16 + codes[5];
    return high << 14 | low >> 2;
}

// The 32 lanes of a team, added as the scalar kernel does: signal in the team's first thread, noise in its second.
__device__ __forceinline__ float tree_sum(const Sums& sums, bool second) {
    float kept[WIDTH / 2];
#pragma unroll
    for (u32 i = 0; i < WIDTH / 2; i++) {
        const float signal = __fadd_rn(sums.signal[2 * i], sums.signal[2 * i + 1]);
        const float noise = __fadd_rn(sums.noise[2 * i], sums.noise[2 * i + 1]);
        // Each gives the other what that one sums.
        kept[i] = __fadd_rn(second ? noise : signal, __shfl_xor_sync(FULL_MASK, second ? signal : noise, 1));
    }
#pragma unroll
    for (u32 half = WIDTH / 4; half > 0; half /= 2)
#pragma unroll
        for (u32 i = 0; i < half; i++) kept[i] = __fadd_rn(kept[i], kept[i + half]);
    return kept[0];
}

// What a kernel is given: `elements` elements in blocks of `block_size`, of which only the last may be short. `source` and
// `packed` start at multiples of 16 bytes.
struct Blocks {
    const u8* source;
    u32 elements, block_size;
    u8* packed;
    float *absmax, *signal, *noise, *worst;
};

// The thread's share of a row's elements past `rows` rows, in a round.
__device__ __forceinline__ u32 rest_of(u32 count, u32 lane, u32 round) {
    const u32 rest = count % ROW, before = lane + round;
    return rest > before ? min(rest - before, ROUND) : 0;
}

// Quantizes one block. Threads past the last block go through it with nothing in hand, since shuffles need whole warps.
// A NaN or an infinity shows as such in the block's absmax; its other results mean nothing then.
template <Dtype D, bool FP4>
__device__ __forceinline__ void quantize_block(const Blocks& blocks, const Table& table, u32 block) {
    const u32 element = D == F32 ? 4 : 2;
    const size_t first = size_t(block) * blocks.block_size;
    const u32 left = first < blocks.elements ? u32(blocks.elements - first) : 0;
    const u32 count = min(left, blocks.block_size);
    const u32 rows = count / ROW;
    const bool second = threadIdx.x % TEAM != 0;
    const u32 lane = second ? WIDTH : 0;
    const u8* source = blocks.source + (first + lane) * element;
    u8* packed = blocks.packed + (first + lane) / 2;

    Largest largest = {0, 0};
#pragma unroll 2
    for (u32 row = 0; row < rows; row++)
#pragma unroll
        for (u32 round = 0; round < WIDTH; round += ROUND)
            take_in<D>(largest, load<D>(source + (row * ROW + round) * element));
    const bool is_short = count < blocks.block_size;
    if (is_short)
#pragma unroll 1
        for (u32 round = 0; round < WIDTH; round += ROUND)
            take_in<D>(largest, load_some<D>(source + (rows * ROW + round) * element, rest_of(count, lane, round)));
    const float most = __uint_as_float(team_largest<D>(largest));
    const float divisor = fmaxf(most, ABSMAX_FLOOR);

    Sums sums = {};
    float x[ROUND];
    if (!is_short) {
        const float reciprocal = __frcp_rn(divisor);
#pragma unroll 1
        for (u32 row = 0; row < rows; row++) {
            u32 codes[WIDTH / ROUND];
#pragma unroll
            for (u32 round = 0; round < WIDTH; round += ROUND) {
                decode<D>(load<D>(source + (row * ROW + round) * element), x);
#pragma unroll
                for (u32 i = 0; i < ROUND; i++) x[i] = __fmul_rn(x[i], reciprocal);
                codes[round / ROUND] = encode<FP4>(x, round, table, sums);
            }
            *reinterpret_cast<uint2*>(packed + row * ROW / 2) = make_uint2(codes[0], codes[1]);
        }
    } else {
        // The short last block is divided, not multiplied. What pads its last row is zero, and adds nothing to the sums.
#pragma unroll 1
        for (u32 row = 0; row <= rows; row++) {
#pragma unroll
            for (u32 round = 0; round < WIDTH; round += ROUND) {
                const u32 here = row < rows ? ROUND : rest_of(count, lane, round);
                decode<D>(load_some<D>(source + (row * ROW + round) * element, here), x);
#pragma unroll
                for (u32 i = 0; i < ROUND; i++) x[i] = __fdiv_rn(x[i], divisor);
                const u32 codes = encode<FP4>(x, round, table, sums);
#pragma unroll
                for (u32 i = 0; i < ROUND / 2; i++)
                    if (2 * i < here) packed[(row * ROW + round) / 2 + i] = u8(codes >> (8 * i));
            }
        }
    }

    const float sum = tree_sum(sums, second);
    const float worst = fmaxf(sums.worst, __shfl_xor_sync(FULL_MASK, sums.worst, 1));
    if (count == 0) return;
    if (second) {
        blocks.noise[block] = sum;
        blocks.worst[block] = worst;
    } else {
        blocks.signal[block] = sum;
        blocks.absmax[block] = !is_short || isnan(most) ? most : divisor;
    }
}

// Quantizes all blocks, so many at a time as there are teams in the grid.
template <Dtype D, bool FP4> __device__ __forceinline__ void quantize(const Blocks& blocks, const Table* tables) {
    __shared__ Table table;
    for (u32 i = threadIdx.x; i < sizeof(Table) / 4; i += THREADS)
        reinterpret_cast<u32*>(&table)[i] = reinterpret_cast<const u32*>(tables)[i];
    __syncthreads();
    for (u32 group = blockIdx.x; size_t(group) * TEAMS * blocks.block_size < blocks.elements; group += gridDim.x)
        quantize_block<D, FP4>(blocks, table, group * TEAMS + threadIdx.x / TEAM);
}

#define QUANTIZE(name, dtype, fp4)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 6)                                                                \
    name(const u8* __restrict__ source, u32 elements, u32 block_size, const Table* __restrict__ table,                     \
         u8* __restrict__ packed, float* __restrict__ absmax, float* __restrict__ signal, float* __restrict__ noise,       \
         float* __restrict__ worst) {                                                                                      \
        const Blocks blocks = {source, elements, block_size, packed, absmax, signal, noise, worst};                        \
        quantize<dtype, fp4>(blocks, table);                                                                               \
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

// Blocks or groups whose figures are summed together.
#define SUMMED 16

// Sums the figures of 16 blocks, or of 16 groups, in their order, one thread for each 16: what the statistics add up, operation by
// operation (src/stats/mod.rs). `sums` are all signals, then all noises and the worst errors, in units of the weights. `zeros` counts
// blocks of zeros; 255 says that an absmax is NaN. Blocks with an absmax that isn't finite count nowhere.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_figures(const float* __restrict__ absmax, const float* __restrict__ signal, const float* __restrict__ noise,
            const float* __restrict__ worst, u32 blocks, double* __restrict__ sums, u8* __restrict__ zeros) {
    const u32 mine = blockIdx.x * THREADS + threadIdx.x, count = (blocks + SUMMED - 1) / SUMMED;
    if (mine >= count) return;
    const u32 end = min(mine * SUMMED + SUMMED, blocks);
    double signals = 0.0, noises = 0.0, most = 0.0;
    u32 zero = 0;
    bool has_nan = false;
#pragma unroll 1
    for (u32 i = mine * SUMMED; i < end; i++) {
        const float scale = absmax[i], squares = signal[i], errors = noise[i], largest = worst[i];
        has_nan |= isnan(scale);
        if (!(scale < __uint_as_float(0x7f800000))) continue;
        // Exact: the product of two f32.
        const double square = __dmul_rn(double(scale), double(scale));
        signals = __dadd_rn(signals, __dmul_rn(square, double(squares)));
        noises = __dadd_rn(noises, __dmul_rn(square, double(errors)));
        const double error = __dmul_rn(double(scale), double(largest));
        most = error > most ? error : most;
        zero += squares == 0.0f;
    }
    sums[mine] = signals;
    sums[count + mine] = noises;
    sums[2 * size_t(count) + mine] = most;
    zeros[mine] = has_nan ? 255 : u8(zero);
}
