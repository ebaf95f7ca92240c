// Decode attention over a packed cache whose keys are un-rotated turn by turn: three launches, compiled by NVRTC.
//
// 1. prepare: q' = D^T R_-c q for every turn, laid out as the matrix units want it; attention over exact tokens.
// 2. attend: two warps score 128 packed tokens of one group of KV heads at a time, online softmax, value sums.
// 3. combine: splits added up, values decoded, joined with the exact tokens.
//
// From compute capability 9.0 on, attend may begin while prepare ends, and combine while attend ends: each of their
// thread blocks, whatever it has to do, waits for the launch before it (await_previous) before it reads what that one
// wrote, or writes anything. So combine ends after attend has, and attend after prepare has. prepare is launched
// plainly: it begins after all that came before it has ended, and may write where launches of an earlier layer read.
//
// Compile-time constants, defined in front of this text by turned.py:
//   HEAD_DIM; GROUP_HEADS, GROUP_COLUMNS: KV heads of a group, query heads of a KV head; their product is at most 8.
//   K16 K8 K4 K2 K1, V16 V8 V4 V2 V1: chunks of 16 components of each number of bits, the most of any group.
//   WARPS: of a thread block of `attend`. STAGED_UNITS: 1 to pass units through shared memory. MIN_BLOCKS: on a
//   multiprocessor. ALWAYS_CLAMP: 1 where a row is shorter than what reading on beyond a class may read. KEY_GAIN,
//   VALUE_GAIN, HAS_MASK: 0 or 1. QUERY_BF16: 1 for bfloat16 queries, keys, values and outputs, 0 for float16.
//
// Words of mma.sync.m16n8k16: lane = 4 r + c. Codes stay integers: as the bits of float16 numbers they are
// code * 2^(place - 24) (subnormal), exactly, and the other factor is scaled by 2^-place. A unit is 4 packed blocks =
// 16 quarters of 8 tokens; quarter r (blocks 0, 1) and r + 8 (blocks 2, 3) are the rows of a product, and there is one
// product for each place in a quarter. Two warps share a unit: side 0 takes places 0..3 and side 1 places 4..7, each
// with a softmax and sums of its own.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define KEY_CHUNKS (K16 + K8 + K4 + K2 + K1)
#define VALUE_CHUNKS (V16 + V8 + V4 + V2 + V1)
#define PAIRS (WARPS / 2)
#define PREPARE_WARPS 4
#define EXACT_TOKENS 32  // of a thread block: as many as a warp has lanes
#define EXACT_PARTS(TOKENS) (((TOKENS) + EXACT_TOKENS - 1) / EXACT_TOKENS)
#define RING 4
#define NEVER (-1e30f)          // stands for -inf: differences of two stay finite
#define CODE_SCALE 16777216.0f  // 2^24
#define QUERY_SCALE 64.0f       // of absorbed queries, so that the smallest stay normal float16 numbers
#define WEIGHT_BITS 8.0f        // weights are stored times 2^8, for the same reason

// ------------------------------------------------------------------------------------------------------- instructions
// Everything that is not plain C++; tests/emulator has the same in C++, so that the kernels run on a CPU there.
#ifndef EMULATED

#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

__device__ __forceinline__ float from_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u32 to_half2(float low, float high) {
    u32 h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
}

__device__ __forceinline__ u16 to_bfloat16(float x) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

__device__ __forceinline__ float exp_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 half2_product(u32 x, u32 y) {
    u32 z;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}

__device__ __forceinline__ u32 shared_word(u32 address) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

// The compiler would work these out anew for every access.
__device__ __forceinline__ void pin(u32& address) { asm volatile("" : "+r"(address)); }
__device__ __forceinline__ void pin(u32& to, const char*& from) { asm volatile("" : "+r"(to), "+l"(from)); }

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void meet(int pair) {  // of a pair's two warps
    asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory");
}

// The next launch may begin once every thread block has said so, or has ended; elsewhere than on compute capability 9.0
// and later it begins when this one has ended.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the launch before this one has ended, and all that it wrote can be read.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

__device__ __forceinline__ float number(u16 bits) {
    return QUERY_BF16 ? __uint_as_float((u32)bits << 16) : from_half(bits);
}

__device__ __forceinline__ u16 stored(float x) {
    return QUERY_BF16 ? to_bfloat16(x) : (u16)(to_half2(x, 0.0f) & 0xffff);
}

__device__ __forceinline__ float clamped(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

// What a row of the packed cache holds of one group: for 16, 8, 4, 2 and 1 bits the first word, the first row of the
// decoder, and the number of components.
struct Class {
    int word, row, count;
};

// ------------------------------------------------------------------------------------------------------------ prepare

#define STEPS (HEAD_DIM / 32)  // products of 16 dimensions for each half of a head
#define TURN_ROWS (16 / (GROUP_COLUMNS <= 1 ? 1 : GROUP_COLUMNS <= 2 ? 2 : GROUP_COLUMNS <= 4 ? 4 : 8))  // turns a warp
#define PADDED_COLUMNS (16 / TURN_ROWS)

// Offset of the codes of a chunk: 2^(bits - 1) - 1/2.
__device__ __forceinline__ float offset_of(int chunk) {
    return chunk < K16                  ? 0.0f
           : chunk < K16 + K8           ? 127.5f
           : chunk < K16 + K8 + K4      ? 7.5f
           : chunk < K16 + K8 + K4 + K2 ? 1.5f
                                        : 0.5f;
}

// One thread block: the queries of one KV head, turned back for TURN_ROWS turns in each warp. decoder: of all heads, as
// the second factor of products: [KV heads, KEY_CHUNKS, 2, 2 STEPS, 32 lanes] of 4 float16 numbers; chunks of it pass
// through `memory`, RING of them at a time.
__device__ __forceinline__ void absorb(
    int task, const u16* query, const uint2* decoder, const float* key_mean, const float2* angles, u32* absorbed,
    float2* biases, int n_turns, int n_kv_heads, int q_batch, int q_head, int angle_batch, float scale, uint2* memory
) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int parts = (n_turns + TURN_ROWS * PREPARE_WARPS - 1) / (TURN_ROWS * PREPARE_WARPS);
    const int head = task / parts % n_kv_heads, batch = task / parts / n_kv_heads;
    const int group = head / GROUP_HEADS, n_groups = n_kv_heads / GROUP_HEADS;
    u32 q[2 * STEPS][4];
    int place[2];
    bool wanted[2];
    float bias[2] = {0.0f, 0.0f}, mean[2] = {0.0f, 0.0f};
    int entry[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = r + 8 * half;
        const int turn = (task % parts * PREPARE_WARPS + threadIdx.x / 32) * TURN_ROWS + row / PADDED_COLUMNS,
                  own = row % PADDED_COLUMNS;
        wanted[half] = turn < n_turns && own < GROUP_COLUMNS;
        const int column = head % GROUP_HEADS * GROUP_COLUMNS + own;
        entry[half] = ((batch * n_turns + turn) * n_groups + group) * 8 + column;
        place[half] = (((batch * n_turns + turn) * n_groups + group) * KEY_CHUNKS * 32 + column * 4 + c) * 2;
        const u16* from = query + (size_t)batch * q_batch + (head * GROUP_COLUMNS + own) * q_head + c * (HEAD_DIM / 8);
        const float2* angle = angles + (size_t)batch * angle_batch + (size_t)turn * (HEAD_DIM / 2) + c * (HEAD_DIM / 8);
        const float* m = key_mean + head * HEAD_DIM + c * (HEAD_DIM / 8);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint2 low = make_uint2(0, 0), high = make_uint2(0, 0);
            float4 turned[2] = {
                make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)
            };  // cos and sin of the turn's position
            if (wanted[half]) {
                low = *(const uint2*)(from + 4 * step);
                high = *(const uint2*)(from + 4 * step + HEAD_DIM / 2);
                turned[0] = *(const float4*)(angle + 4 * step);
                turned[1] = *(const float4*)(angle + 4 * step + 2);
            }
            const float4 m_re = *(const float4*)(m + 4 * step), m_im = *(const float4*)(m + 4 * step + HEAD_DIM / 2);
            const float x[4] = {
                number(low.x & 0xffff), number(low.x >> 16), number(low.y & 0xffff), number(low.y >> 16)
            };
            const float y[4] = {
                number(high.x & 0xffff), number(high.x >> 16), number(high.y & 0xffff), number(high.y >> 16)
            };
            const float cosine[4] = {turned[0].x, turned[0].z, turned[1].x, turned[1].z};
            const float sine[4] = {turned[0].y, turned[0].w, turned[1].y, turned[1].w};
            float re[4], im[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                re[i] = x[i] * cosine[i] + y[i] * sine[i];
                im[i] = y[i] * cosine[i] - x[i] * sine[i];
            }
            mean[half] += re[0] * m_re.x + re[1] * m_re.y + re[2] * m_re.z + re[3] * m_re.w;
            mean[half] += im[0] * m_im.x + im[1] * m_im.y + im[2] * m_im.z + im[3] * m_im.w;
            q[step][half] = to_half2(re[0], re[1]);
            q[step][2 + half] = to_half2(re[2], re[3]);
            q[STEPS + step][half] = to_half2(im[0], im[1]);
            q[STEPS + step][2 + half] = to_half2(im[2], im[3]);
        }
    }
    const int chunk_size = 4 * STEPS * 32;  // in uint2
    decoder += head * (KEY_CHUNKS * chunk_size);
    const float to_stored = scale * QUERY_SCALE;
    u32 to = shared_address(memory) + 16 * threadIdx.x;
    const char* source = (const char*)decoder + 16 * threadIdx.x;
    pin(to, source);
    auto fetch = [&](int chunk) {
        const int pieces = chunk < KEY_CHUNKS ? chunk_size / 2 - threadIdx.x : 0;
#pragma unroll
        for (int i = 0; i < chunk_size / 2; i += 32 * PREPARE_WARPS)
            if (i < pieces) copy_16(to + chunk % RING * (8 * chunk_size) + 16 * i, source + 16 * i);
        source += 8 * chunk_size;
        commit();
    };
#pragma unroll
    for (int chunk = 0; chunk < RING - 1; chunk++) fetch(chunk);
#pragma unroll 1
    for (int chunk = 0; chunk < KEY_CHUNKS; chunk++) {
        wait<RING - 2>();
        __syncthreads();
        fetch(chunk + RING - 1);  // where the chunk before this one lay
        const uint2* from = memory + chunk % RING * chunk_size + lane;
        float d[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
        for (int step = 0; step < 2 * STEPS; step++)
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const uint2 b = from[(tile * 2 * STEPS + step) * 32];
                mma(d[tile], q[step][0], q[step][1], q[step][2], q[step][3], b.x, b.y);
            }
        const float offset = offset_of(chunk);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint2 pairs;  // components c and c + 4, c + 8 and c + 12
            pairs.x = to_half2(clamped(d[0][2 * half] * to_stored), clamped(d[0][2 * half + 1] * to_stored));
            pairs.y = to_half2(clamped(d[1][2 * half] * to_stored), clamped(d[1][2 * half + 1] * to_stored));
            bias[half] += offset * (from_half(pairs.x & 0xffff) + from_half(pairs.x >> 16) +
                                    from_half(pairs.y & 0xffff) + from_half(pairs.y >> 16));
            if (wanted[half]) *(uint2*)(absorbed + place[half] + chunk * 64) = pairs;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            bias[half] += __shfl_xor_sync(0xffffffffu, bias[half], step);
            mean[half] += __shfl_xor_sync(0xffffffffu, mean[half], step);
        }
        if (wanted[half] && c == 0) biases[entry[half]] = make_float2(bias[half] / QUERY_SCALE, mean[half] * scale);
    }
}

#define KEY_STRIDE (HEAD_DIM + (HEAD_DIM % 64 ? 0 : 32))  // of exact tokens in shared memory: 16 banks apart

// One thread block: EXACT_TOKENS exact tokens of one KV head, so few that all of them are asked for at once. sums:
// [batch, KV heads, parts, GROUP_COLUMNS, HEAD_DIM]; stats: [batch, KV heads, parts, GROUP_COLUMNS], largest score and
// sum of weights. Size of scores: turned.py, _exact_bytes.
__device__ __forceinline__ void attend_exact(
    int task, const u16* query, const u16* sink_keys, const u16* sink_values, const u16* keys, const u16* values,
    const u8* mask, float* sums, float2* stats, int n_kv_heads, int n_sinks, int n_recent, int q_batch, int q_head,
    int s_batch, int s_head, int s_token, int k_batch, int k_head, int k_token, int v_batch, int v_head, int v_token,
    float scale, float* scores
) {
    constexpr int threads = 32 * PREPARE_WARPS, row = HEAD_DIM / 8;  // in pieces of 16 bytes
    u16* own_query = (u16*)(scores + GROUP_COLUMNS * EXACT_TOKENS);  // [GROUP_COLUMNS, HEAD_DIM]
    u16* own_values = own_query + GROUP_COLUMNS * HEAD_DIM;          // [EXACT_TOKENS, HEAD_DIM]
    u16* own_keys = own_values + EXACT_TOKENS * HEAD_DIM;            // [EXACT_TOKENS, KEY_STRIDE]
    const int n = n_sinks + n_recent, parts = EXACT_PARTS(n), first = task % parts * EXACT_TOKENS;
    const int head = task / parts % n_kv_heads, batch = task / parts / n_kv_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    query += (size_t)batch * q_batch + head * GROUP_COLUMNS * q_head;
    sink_keys += (size_t)batch * s_batch + head * s_head;
    sink_values += (size_t)batch * s_batch + head * s_head;
    keys += (size_t)batch * k_batch + head * k_head;
    values += (size_t)batch * v_batch + head * v_head;
    // After the last token, it is there again: to be multiplied with weights of 0.
    auto fetch = [&](u16* to, int stride, const u16* sinks, const u16* recent, int recent_stride) {
#pragma unroll
        for (int i = 0; i < EXACT_TOKENS * row / threads; i++) {
            const int piece = i * threads + threadIdx.x, token = min(first + piece / row, n - 1);
            const u16* from = token < n_sinks ? sinks + token * s_token : recent + (token - n_sinks) * recent_stride;
            copy_16(shared_address(to + piece / row * stride + piece % row * 8), from + piece % row * 8);
        }
    };
#pragma unroll
    for (int i = 0; i < GROUP_COLUMNS * row; i += threads) {
        const int piece = i + threadIdx.x;
        if (piece < GROUP_COLUMNS * row)
            copy_16(shared_address(own_query + piece * 8), query + piece / row * q_head + piece % row * 8);
    }
    fetch(own_keys, KEY_STRIDE, sink_keys, keys, k_token);
    commit();
    fetch(own_values, HEAD_DIM, sink_values, values, v_token);
    commit();

    // Scores: eight lanes a token, an eighth of a head each, in pieces of 4 dimensions that lie 32 apart.
    constexpr int rounds = EXACT_TOKENS / (4 * PREPARE_WARPS);
    const int eighth = lane % 8, mine = warp * 4 + lane / 8;
    u8 allowed[rounds];
#pragma unroll
    for (int round = 0; round < rounds; round++) {
        const int token = first + mine + round * 4 * PREPARE_WARPS;
        allowed[round] = token >= n ? 0 : mask ? mask[(size_t)batch * n + token] : 1;
    }
    float dot[rounds][GROUP_COLUMNS];
#pragma unroll
    for (int round = 0; round < rounds; round++)
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++) dot[round][g] = 0.0f;
    wait<1>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
        uint2 k[rounds];
#pragma unroll
        for (int round = 0; round < rounds; round++)
            k[round] =
                *(const uint2*)(own_keys + (mine + round * 4 * PREPARE_WARPS) * KEY_STRIDE + eighth * 4 + 32 * i);
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++) {
            const uint2 q = *(const uint2*)(own_query + g * HEAD_DIM + eighth * 4 + 32 * i);
#pragma unroll
            for (int round = 0; round < rounds; round++)
                dot[round][g] += number(q.x & 0xffff) * number(k[round].x & 0xffff) +
                                 number(q.x >> 16) * number(k[round].x >> 16) +
                                 number(q.y & 0xffff) * number(k[round].y & 0xffff) +
                                 number(q.y >> 16) * number(k[round].y >> 16);
        }
    }
#pragma unroll
    for (int round = 0; round < rounds; round++)
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++) {
#pragma unroll
            for (int step = 4; step; step /= 2) dot[round][g] += __shfl_xor_sync(0xffffffffu, dot[round][g], step);
            if (eighth == 0)
                scores[g * EXACT_TOKENS + mine + round * 4 * PREPARE_WARPS] =
                    allowed[round] ? dot[round][g] * scale : NEVER;
        }
    wait<0>();
    __syncthreads();
    for (int g = warp; g < GROUP_COLUMNS; g += PREPARE_WARPS) {
        const float s = scores[g * EXACT_TOKENS + lane];
        float top = s;
#pragma unroll
        for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
        const float p = s <= NEVER ? 0.0f : exp_2(s - top);
        float total = p;
#pragma unroll
        for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        scores[g * EXACT_TOKENS + lane] = p;
        if (lane == 0) stats[task * GROUP_COLUMNS + g] = make_float2(top, total);
    }
    __syncthreads();
    // Values: a line of threads takes `steps` neighbouring tokens, each thread four dimensions; some may be left over.
    constexpr int across = HEAD_DIM / 4, lines = threads / across, steps = (EXACT_TOKENS - 1) / lines + 1;
    const int dim = threadIdx.x % across * 4, line = threadIdx.x / across;
    float* partial = (float*)own_keys;  // [lines, GROUP_COLUMNS, HEAD_DIM]: keys are done with
    if (line < lines) {
        float4 sum[GROUP_COLUMNS];
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++) sum[g] = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < steps; i++) {
            const int token = line * steps + i;
            if (EXACT_TOKENS % lines && token >= EXACT_TOKENS) break;
            const uint2 v = *(const uint2*)(own_values + token * HEAD_DIM + dim);
#pragma unroll
            for (int g = 0; g < GROUP_COLUMNS; g++) {
                const float p = scores[g * EXACT_TOKENS + token];
                sum[g].x += p * number(v.x & 0xffff);
                sum[g].y += p * number(v.x >> 16);
                sum[g].z += p * number(v.y & 0xffff);
                sum[g].w += p * number(v.y >> 16);
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++)
            *(float4*)(partial + (line * GROUP_COLUMNS + g) * HEAD_DIM + dim) = sum[g];
    }
    __syncthreads();
#pragma unroll
    for (int start = 0; start < GROUP_COLUMNS * HEAD_DIM; start += threads) {
        const int i = start + threadIdx.x;
        if (i >= GROUP_COLUMNS * HEAD_DIM) break;
        float all = 0.0f;
#pragma unroll
        for (int k = 0; k < lines; k++) all += partial[k * GROUP_COLUMNS * HEAD_DIM + i];
        sums[(size_t)task * GROUP_COLUMNS * HEAD_DIM + i] = all;
    }
}

// Thread blocks: first those of `attend_exact`, EXACT_PARTS for each (sequence, KV head); then those of `absorb`.
// query: [batch, heads, 1, HEAD_DIM]; decoder: see absorb; angles: [1 or batch, n_turns, HEAD_DIM / 2], cos and sin;
// absorbed: [batch, n_turns, groups, KEY_CHUNKS, 32 lanes, 2] pairs of float16; biases: [batch, n_turns, groups, 8].
extern "C" __global__ void __launch_bounds__(32 * PREPARE_WARPS) prepare(
    const u16* query, const uint2* decoder, const float* key_mean, const float2* angles, const int* last, u32* absorbed,
    float2* biases, const u16* sink_keys, const u16* sink_values, const u16* keys, const u16* values,
    const u8* exact_mask, float* exact_sums, float2* exact_stats, int n_batch, int n_turns, int n_kv_heads,
    int turn_shift, int angle_batch, int n_sinks, int n_recent, int has_exact_mask, int q_batch, int q_head,
    int s_batch, int s_head, int s_token, int k_batch, int k_head, int k_token, int v_batch, int v_head, int v_token,
    double scaling
) {
    DYNAMIC_SHARED(float, scores);
    let_next_begin();
    const float scale = (float)scaling;
    const int n_exact = n_batch * n_kv_heads * EXACT_PARTS(n_sinks + n_recent), block = blockIdx.x;
    if (block < n_exact) {
        attend_exact(
            block, query, sink_keys, sink_values, keys, values, has_exact_mask ? exact_mask : 0, exact_sums,
            exact_stats, n_kv_heads, n_sinks, n_recent, q_batch, q_head, s_batch, s_head, s_token, k_batch, k_head,
            k_token, v_batch, v_head, v_token, scale, scores
        );
        return;
    }
    // Turns that begin beyond what counts of a sequence are never scored.
    const int parts = (n_turns + TURN_ROWS * PREPARE_WARPS - 1) / (TURN_ROWS * PREPARE_WARPS), task = block - n_exact;
    if ((task % parts * (TURN_ROWS * PREPARE_WARPS) << turn_shift) * 128 >= last[task / parts / n_kv_heads]) return;
    absorb(
        task, query, decoder, key_mean, angles, absorbed, biases, n_turns, n_kv_heads, q_batch, q_head, angle_batch,
        scale, (uint2*)scores
    );
}

// ------------------------------------------------------------------------------------------------------------- attend

// Words that one lane needs of one component's quarter of 8 tokens.
#define QUARTER_WORDS(BITS) ((BITS) > 4 ? (BITS) / 4 : 1)

template <int BITS>
__device__ __forceinline__ int quarter_word(int component, int quarter) {
    return BITS >= 4 ? component * BITS + quarter * QUARTER_WORDS(BITS)
                     : component * BITS + (BITS == 2 ? quarter / 2 : 0);
}

// A side's codes of two quarters lie in the two halves of a word, from bit 0 on; those beyond bit 10 are shifted down
// by 8.
template <int BITS>
__device__ __forceinline__ constexpr int place_of(int t) {
    return BITS > 4 ? 0 : BITS == 4 ? (t & 1) * 4 : BITS * t;
}

// Codes of place t of a side as two float16 numbers, times 2^(place_of(t) - 24).
template <int BITS>
__device__ __forceinline__ u32 codes(u32 packed, int t) {
    const u32 keep = ((1u << BITS) - 1) << place_of<BITS>(t);
    return (BITS == 4 && t >= 2 ? packed >> 8 : packed) & (keep | keep << 16);
}

// The bytes of a permutation that takes byte `from` of each of two words as the low bytes of two halves.
__device__ __forceinline__ u32 byte_of(int from) { return from | from << 4 | (4 + from) << 8 | (4 + from) << 12; }

__device__ __forceinline__ u32 scaled(u32 x, int place) {  // two float16 numbers times 2^-place
    return place ? half2_product(x, (u32)(15 - place) << 10 | (u32)(15 - place) << 26) : x;
}

// Chunks of 16 components of one class into the eight accumulators: rows are quarters, columns queries.
// row0, row1: this lane's two blocks. Where a chunk has fewer components, what follows them is read as if they were
// there: their queries are 0. CLAMP: not so near the end of the cache, where nothing follows. Words of a class of a
// block from some component on: in memory, or (STAGED) in shared memory.
struct Words {
    const u32* memory;
    u32 staged;
};

template <bool STAGED>
__device__ __forceinline__ u32 word_at(const Words& from, int i) {
    return STAGED ? shared_word(from.staged + 4 * i) : __ldg(from.memory + i);
}

template <bool STAGED>
__device__ __forceinline__ void advance(Words& words, int n) {
    if (STAGED) {
        words.staged += 4 * n;
        pin(words.staged);
    } else {
        words.memory += n;
    }
}

template <int BITS, int CHUNKS, bool CLAMP, bool STAGED>
__device__ __forceinline__ void score_class(
    float (&s)[4][4], Words row0, Words row1, const Class* own, const uint2* q, int c, int quarter, int side
) {
    if (CHUNKS == 0) return;
    constexpr bool clamp = CLAMP || BITS == 16;  // what follows might be no number
    // 4 bits: the low or high halves of a quarter's words; 2 and 1 bits: a byte of them.
    const u32 pick = BITS == 4 ? (side ? 0x7632u : 0x5410u) : byte_of(BITS == 2 ? (quarter & 1) * 2 + side : quarter);
    const int last = clamp ? max(own->count - 1, 0) : 0;
    const int lane = quarter_word<BITS>(clamp ? 0 : c, quarter) + (BITS > 4 ? side * (BITS / 8) : 0);
    advance<STAGED>(row0, lane);
    advance<STAGED>(row1, lane);
#pragma unroll(STAGED || CHUNKS < 1 ? 1 : CHUNKS)
    for (int chunk = 0; chunk < CHUNKS; chunk++, q += 32) {
        const uint2 b = STAGED ? *q : __ldg(q);
        int at[4];
#pragma unroll
        for (int i = 0; i < 4; i++) at[i] = BITS * (clamp ? min(chunk * 16 + c + 4 * i, last) : 4 * i);
#pragma unroll
        for (int word = 0; word < (BITS == 16 ? 2 : 1); word++) {
            u32 x[4][2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[i][0] = word_at<STAGED>(row0, at[i] + word);
                x[i][1] = word_at<STAGED>(row1, at[i] + word);
            }
            if (BITS <= 4) {
                u32 a0 = __byte_perm(x[0][0], x[1][0], pick), a1 = __byte_perm(x[0][1], x[1][1], pick);
                u32 a2 = __byte_perm(x[2][0], x[3][0], pick), a3 = __byte_perm(x[2][1], x[3][1], pick);
                if (BITS == 1) a0 >>= 4 * side, a1 >>= 4 * side, a2 >>= 4 * side, a3 >>= 4 * side;
#pragma unroll
                for (int t = 0; t < 4; t++)
                    mma(s[t], codes<BITS>(a0, t), codes<BITS>(a1, t), codes<BITS>(a2, t), codes<BITS>(a3, t),
                        scaled(b.x, place_of<BITS>(t)), scaled(b.y, place_of<BITS>(t)));
            } else {
#pragma unroll
                for (int i = 0; i < 32 / BITS; i++) {
                    const u32 wide = BITS == 16 ? (i ? 0x7632u : 0x5410u) : byte_of(i);
                    const u32 keep = BITS == 16 ? 0xffffffffu : 0x00ff00ffu;
                    mma(s[word * 2 + i], __byte_perm(x[0][0], x[1][0], wide) & keep,
                        __byte_perm(x[0][1], x[1][1], wide) & keep, __byte_perm(x[2][0], x[3][0], wide) & keep,
                        __byte_perm(x[2][1], x[3][1], wide) & keep, b.x, b.y);
                }
            }
        }
        if (!clamp) {
            advance<STAGED>(row0, 16 * BITS);
            advance<STAGED>(row1, 16 * BITS);
        }
    }
}

// Chunks of 16 value components into their accumulators: rows are components, columns queries. row: the block of
// quarters 2c and 2c + 1; weights[t]: of place t, transposed. Rows beyond the last component are sums of nothing in
// particular.
template <int BITS, int FIRST, int CHUNKS, bool CLAMP, bool STAGED>
__device__ __forceinline__ void sum_class(
    float (&sums)[VALUE_CHUNKS + 1][4], Words row, const Class* own, const u32 (&weights)[4], int r, int quarter,
    int side
) {
    if (CHUNKS == 0) return;
    const int last = CLAMP ? max(own->count - 1, 0) : 0;
    const u32 halves = side ? 0x7632u : 0x5410u;
    // 2 bits: both quarters lie in one word, a half each; 1 bit: a byte each.
    const u32 bytes =
        BITS == 2 ? (side ? 0x3311u : 0x2200u) : quarter | quarter << 4 | (quarter + 1) << 8 | (quarter + 1) << 12;
    advance<STAGED>(row, quarter_word<BITS>(CLAMP ? 0 : r, quarter) + (BITS > 4 ? side * (BITS / 8) : 0));
    u32 p[4];
#pragma unroll
    for (int t = 0; t < 4; t++) p[t] = scaled(weights[t], place_of<BITS>(t));
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        float (&o)[4] = sums[FIRST + chunk];
        const int x0 = BITS * (CLAMP ? min(16 * chunk + r, last) : 16 * chunk);
        const int x1 = BITS * (CLAMP ? min(16 * chunk + r + 8, last) : 16 * chunk + 8);
        if (BITS <= 4) {
            u32 y0, y1;
            if (BITS == 4) {
                y0 = __byte_perm(word_at<STAGED>(row, x0), word_at<STAGED>(row, x0 + 1), halves);
                y1 = __byte_perm(word_at<STAGED>(row, x1), word_at<STAGED>(row, x1 + 1), halves);
            } else {
                y0 = __byte_perm(word_at<STAGED>(row, x0), 0, bytes);
                y1 = __byte_perm(word_at<STAGED>(row, x1), 0, bytes);
                if (BITS == 1) y0 >>= 4 * side, y1 >>= 4 * side;
            }
#pragma unroll
            for (int t = 0; t < 4; t += 2)
                mma(o, codes<BITS>(y0, t), codes<BITS>(y1, t), codes<BITS>(y0, t + 1), codes<BITS>(y1, t + 1), p[t],
                    p[t + 1]);
        } else {
#pragma unroll
            for (int word = 0; word < (BITS == 16 ? 2 : 1); word++) {
                const u32 a = word_at<STAGED>(row, x0 + word),
                          b = word_at<STAGED>(row, x0 + QUARTER_WORDS(BITS) + word);
                const u32 d = word_at<STAGED>(row, x1 + word),
                          e = word_at<STAGED>(row, x1 + QUARTER_WORDS(BITS) + word);
#pragma unroll
                for (int i = 0; i < 32 / BITS; i += 2) {
                    const u32 even = BITS == 16 ? 0x5410u : byte_of(i), odd = BITS == 16 ? 0x7632u : byte_of(i + 1);
                    const u32 keep = BITS == 16 ? 0xffffffffu : 0x00ff00ffu;
                    mma(o, __byte_perm(a, b, even) & keep, __byte_perm(d, e, even) & keep,
                        __byte_perm(a, b, odd) & keep, __byte_perm(d, e, odd) & keep, p[word * 2 + i],
                        p[word * 2 + i + 1]);
                }
            }
        }
    }
}

__device__ __forceinline__ float gain(u32 packed, int t) {
    // the code in the mantissa of 2^23, which is cheaper than a conversion
    const float code = __uint_as_float(((packed >> (4 * t)) & 15) | 0x4b000000u) - 8388608.0f;
    return exp_2(code * 0.25f - 1.0f);
}

template <bool CLAMP>
__device__ __forceinline__ int block_of(int block, int n_blocks) {
    return CLAMP ? min(block, n_blocks - 1) : block;
}

// Words of one part's blocks in shared memory: for each class a place of whole chunks and what alignment may need.
#define PIECES(CHUNKS, BITS) ((CHUNKS) ? 4 * (CHUNKS) * (BITS) + 1 : 0)  // of 16 bytes
#define KEY_PIECES (PIECES(K16, 16) + PIECES(K8, 8) + PIECES(K4, 4) + PIECES(K2, 2) + PIECES(K1, 1))
#define VALUE_PIECES (PIECES(V16, 16) + PIECES(V8, 8) + PIECES(V4, 4) + PIECES(V2, 2) + PIECES(V1, 1))
#define PADDED(PIECES) ((PIECES) + (12 - (PIECES) % 8) % 8)  // blocks lie 16 banks apart
#define KEY_BLOCK (4 * PADDED(KEY_PIECES))                   // words
#define VALUE_BLOCK (4 * PADDED(VALUE_PIECES))
#define STAGE_WORDS (4 * KEY_BLOCK + 4 * VALUE_BLOCK + KEY_CHUNKS * 64)  // of two warps

// Copy one class of one part; `lane`: of the two warps, sixteen a block. `from` is where this lane's block begins in
// memory, `to` in shared memory.
template <int BITS, int CHUNKS>
__device__ __forceinline__ void stage_class(u32 to, const u32* from, const Class* own, int lane) {
    if (CHUNKS == 0) return;
    const size_t first = (size_t)(from + own->word), begin = first & ~(size_t)15;
    const int left =
        (int)(first - begin) + 4 * BITS * own->count - 16 * (lane % 16);  // bytes from this lane's first piece on
    const char* source = (const char*)begin + 16 * (lane % 16);
    to += 16 * (lane % 16);
    pin(to, source);
#pragma unroll
    for (int i = 0; i < 16 * PIECES(CHUNKS, BITS); i += 256)
        if (i < left) copy_16(to + i, source + i);
}

__device__ __forceinline__ void stage_keys(
    u32* memory, const u32* words, const Class* kc, int unit, int row, int lane
) {
    const u32* from = words + (size_t)(unit * 4 + lane / 16) * row;
    u32 to = shared_address(memory + lane / 16 * KEY_BLOCK);
    stage_class<16, K16>(to, from, kc, lane);
    stage_class<8, K8>(to += 16 * PIECES(K16, 16), from, kc + 1, lane);
    stage_class<4, K4>(to += 16 * PIECES(K8, 8), from, kc + 2, lane);
    stage_class<2, K2>(to += 16 * PIECES(K4, 4), from, kc + 3, lane);
    stage_class<1, K1>(to += 16 * PIECES(K2, 2), from, kc + 4, lane);
}

__device__ __forceinline__ void stage_queries(u32* memory, const uint2* absorbed, int lane) {
    u32 queries = shared_address(memory + 4 * KEY_BLOCK + 4 * VALUE_BLOCK) + 16 * lane;
    const char* query = (const char*)absorbed + 16 * lane;
    pin(queries, query);
#pragma unroll
    for (int i = 0; i < KEY_CHUNKS * 16; i += 64)
        if (i + lane < KEY_CHUNKS * 16) copy_16(queries + 16 * i, query + 16 * i);
}

__device__ __forceinline__ void stage_values(
    u32* memory, const u32* words, const Class* vc, int unit, int row, int lane
) {
    const u32* from = words + (size_t)(unit * 4 + lane / 16) * row;
    u32 to = shared_address(memory + 4 * KEY_BLOCK + lane / 16 * VALUE_BLOCK);
    stage_class<16, V16>(to, from, vc, lane);
    stage_class<8, V8>(to += 16 * PIECES(V16, 16), from, vc + 1, lane);
    stage_class<4, V4>(to += 16 * PIECES(V8, 8), from, vc + 2, lane);
    stage_class<2, V2>(to += 16 * PIECES(V4, 4), from, vc + 3, lane);
    stage_class<1, V1>(to += 16 * PIECES(V2, 2), from, vc + 4, lane);
}

// Where a class of a block begins, in memory and in shared memory as stage_class put it. staged: the block's address
// there.
__device__ __forceinline__ Words class_of(const u32* row, u32 staged, int pieces_before, int word) {
    return {row + word, staged + 16 * pieces_before + 4 * (((u32)((size_t)row >> 2) + word) % 4)};
}

struct Sizes {
    int lo, hi, n_blocks, key_row, value_row, key_gain_word, value_gain_word, last_staged;
};

// One side of a unit of 128 tokens into the sums `o` (the last one: of the weights themselves, gains included, as the
// products round them), with the largest score so far and the sum of weights of columns 2c and 2c + 1. CLAMP: near the
// end of the cache, see score_class. STAGED: the unit lies in `memory`; as soon as its keys are done with, those of
// unit `next` are asked for, and so with its values.
template <bool CLAMP, bool STAGED>
__device__ __forceinline__ void attend_unit(
    float (&o)[VALUE_CHUNKS + 1][4], float (&top)[2], float (&total)[2], const u32* key_words, const u32* value_words,
    const Class* kc, const Class* vc, const uint2* q, float4 bias, const u8* mask, int unit, const Sizes& sizes,
    u32* memory, const uint2* next_q, int next, int lane, int side, int pair
) {
    const int r = lane / 4, c = lane % 4, quarter = r % 4, n_blocks = sizes.n_blocks, lo = sizes.lo, hi = sizes.hi;
    const int block0 = block_of<CLAMP>(unit * 4 + r / 4, n_blocks),
              block1 = block_of<CLAMP>(unit * 4 + 2 + r / 4, n_blocks);
    const u32* row0 = key_words + (size_t)block0 * sizes.key_row;
    const u32* row1 = key_words + (size_t)block1 * sizes.key_row;
    u32 key_gains[2], value_gains[2];
    if (KEY_GAIN) {
        key_gains[0] = __ldg(row0 + sizes.key_gain_word + quarter) >> (16 * side);
        key_gains[1] = __ldg(row1 + sizes.key_gain_word + quarter) >> (16 * side);
    }
    if (VALUE_GAIN) {
        value_gains[0] =
            __ldg(value_words + (size_t)block0 * sizes.value_row + sizes.value_gain_word + quarter) >> (16 * side);
        value_gains[1] =
            __ldg(value_words + (size_t)block1 * sizes.value_row + sizes.value_gain_word + quarter) >> (16 * side);
    }
    if (STAGED) {
        wait<1>();
        meet(pair);
        q = (const uint2*)(memory + 4 * KEY_BLOCK + 4 * VALUE_BLOCK) + lane;
    }

    float s[4][4];
#pragma unroll
    for (int t = 0; t < 4; t++) s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0.0f;
    const u32 here0 = STAGED ? shared_address(memory + r / 4 * KEY_BLOCK) : 0, here1 = here0 + 8 * KEY_BLOCK;
#define SCORE_CLASS(BITS, CHUNKS, I, CHUNKS_BEFORE, PIECES_BEFORE)                                                     \
    score_class<BITS, CHUNKS, CLAMP, STAGED>(                                                                          \
        s, class_of(row0, here0, PIECES_BEFORE, kc[I].word), class_of(row1, here1, PIECES_BEFORE, kc[I].word), kc + I, \
        q + (CHUNKS_BEFORE) * 32, c, quarter, side                                                                     \
    )
    if (K16) {
        SCORE_CLASS(16, K16, 0, 0, 0);
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[t][i] *= 1.0f / CODE_SCALE;
    }
    SCORE_CLASS(8, K8, 1, K16, PIECES(K16, 16));
    SCORE_CLASS(4, K4, 2, K16 + K8, PIECES(K16, 16) + PIECES(K8, 8));
    SCORE_CLASS(2, K2, 3, K16 + K8 + K4, PIECES(K16, 16) + PIECES(K8, 8) + PIECES(K4, 4));
    SCORE_CLASS(1, K1, 4, K16 + K8 + K4 + K2, PIECES(K16, 16) + PIECES(K8, 8) + PIECES(K4, 4) + PIECES(K2, 2));
    if (STAGED) {
        meet(pair);
        if (next < sizes.last_staged) {
            stage_keys(memory, key_words, kc, next, sizes.key_row, 32 * side + lane);
            stage_queries(memory, next_q, 32 * side + lane);
        }
        commit();
    }

    float high[2] = {NEVER, NEVER};
#pragma unroll
    for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float g = KEY_GAIN ? gain(key_gains[half], t) : 1.0f;
            s[t][2 * half] = (s[t][2 * half] * (CODE_SCALE / QUERY_SCALE) - bias.x) * g + bias.y;
            s[t][2 * half + 1] = (s[t][2 * half + 1] * (CODE_SCALE / QUERY_SCALE) - bias.z) * g + bias.w;
        }
    }
    if (HAS_MASK || unit * 128 < lo || unit * 128 + 128 > hi) {
        const int token =
            unit * 128 + r * 8 + 4 * side;  // of the first place of the first row; the second is 64 tokens on
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int mine = token + 64 * half + t;
                bool seen = mine >= lo && mine < hi;
                if (HAS_MASK) seen = seen && mask[mine] != 0;
                if (!seen) s[t][2 * half] = s[t][2 * half + 1] = NEVER;
            }
    }
#pragma unroll
    for (int t = 0; t < 4; t++) {
        high[0] = fmaxf(high[0], fmaxf(s[t][0], s[t][2]));
        high[1] = fmaxf(high[1], fmaxf(s[t][1], s[t][3]));
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
        high[0] = fmaxf(high[0], __shfl_xor_sync(0xffffffffu, high[0], step));
        high[1] = fmaxf(high[1], __shfl_xor_sync(0xffffffffu, high[1], step));
    }
    if (__any_sync(0xffffffffu, high[0] > top[0] || high[1] > top[1])) {
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float now = fmaxf(top[i], high[i]);
            shrink[i] = exp_2(top[i] - now);
            top[i] = now;
            total[i] *= shrink[i];
        }
#pragma unroll
        for (int i = 0; i <= VALUE_CHUNKS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) o[i][j] *= shrink[j % 2];
    }
    // Where nothing was seen yet, weights must be 0 and not 1.
    const float base0 = (top[0] == NEVER ? 0.0f : top[0]) - WEIGHT_BITS,
                base1 = (top[1] == NEVER ? 0.0f : top[1]) - WEIGHT_BITS;
    u32 p[2][4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float x = exp_2(s[t][2 * half] - base0), y = exp_2(s[t][2 * half + 1] - base1);
            const float g = VALUE_GAIN ? gain(value_gains[half], t) : 1.0f;
            total[0] += x;
            total[1] += y;
            p[half][t] = transposed(to_half2(x * g, y * g));
        }
    }
    if (STAGED) {
        wait<1>();
        meet(pair);
    }
#pragma unroll(STAGED ? 1 : 2)
    for (int half = 0; half < 2; half++) {
        u32 weights[4];
#pragma unroll
        for (int t = 0; t < 4; t++) weights[t] = half ? p[1][t] : p[0][t];
        const u32* row = value_words + (size_t)block_of<CLAMP>(unit * 4 + 2 * half + c / 2, n_blocks) * sizes.value_row;
        const u32 here = STAGED ? shared_address(memory + 4 * KEY_BLOCK + (2 * half + c / 2) * VALUE_BLOCK) : 0;
        const int even = c % 2 * 2;
        const u32 one = 0x3c003c00u;
#pragma unroll
        for (int t = 0; t < 4; t += 2) mma(o[VALUE_CHUNKS], one, one, one, one, weights[t], weights[t + 1]);
#define SUM_CLASS(BITS, FIRST, CHUNKS, I, PIECES_BEFORE)                                  \
    sum_class<BITS, FIRST, CHUNKS, CLAMP, STAGED>(                                        \
        o, class_of(row, here, PIECES_BEFORE, vc[I].word), vc + I, weights, r, even, side \
    )
        SUM_CLASS(16, 0, V16, 0, 0);
        SUM_CLASS(8, V16, V8, 1, PIECES(V16, 16));
        SUM_CLASS(4, V16 + V8, V4, 2, PIECES(V16, 16) + PIECES(V8, 8));
        SUM_CLASS(2, V16 + V8 + V4, V2, 3, PIECES(V16, 16) + PIECES(V8, 8) + PIECES(V4, 4));
        SUM_CLASS(1, V16 + V8 + V4 + V2, V1, 4, PIECES(V16, 16) + PIECES(V8, 8) + PIECES(V4, 4) + PIECES(V2, 2));
    }
    if (STAGED) {
        meet(pair);
        if (next < sizes.last_staged) stage_values(memory, value_words, vc, next, sizes.value_row, 32 * side + lane);
        commit();
    }
}

// Grid: (splits, groups, batch). Each pair of warps takes every PAIRS-th unit of the split's; splits share the units of
// a sequence. stats: [batch, groups, splits, 3, 8]: largest score, sum of weights, sum of weights times gains; sums:
// [batch, groups, splits, 16 VALUE_CHUNKS, 8].
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) attend(
    const u32* key_words, const u32* value_words, const Class* key_classes, const Class* value_classes,
    const uint2* absorbed, const float2* biases, const int* first, const int* last, const u8* mask, float* stats,
    float* sums, int n_blocks, int n_turns, int turn_shift, int key_row, int value_row, int key_blocks,
    int value_blocks, int key_gain_word, int value_gain_word, int mask_stride
) {
    __shared__ float shared[WARPS][3][8];
    __shared__ float shared_sums[16 * VALUE_CHUNKS * 8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4, r = lane / 4;
    const int side = warp % 2, pair = warp / 2;
    const int split = blockIdx.x, group = blockIdx.y, batch = blockIdx.z, n_groups = gridDim.y;
    key_words += (size_t)batch * key_blocks * key_row;
    value_words += (size_t)batch * value_blocks * value_row;
    const int lo = first[batch], hi = min(last[batch], n_blocks * 32);
    const int n_units = (n_blocks + 3) / 4;
    // Splits share what counts of this sequence, however long the others are.
    const int start = lo / 128, n_used = max((hi + 127) / 128 - start, 0),
              per_split = (n_used + gridDim.x - 1) / gridDim.x;
    const int begin = start + split * per_split, end = start + min((split + 1) * per_split, n_used);
    __shared__ Class classes[10];
    if (threadIdx.x < 10)
        classes[threadIdx.x] = (threadIdx.x < 5 ? key_classes : value_classes)[group * 5 + threadIdx.x % 5];
    __syncthreads();
    const Class *kc = classes, *vc = classes + 5;

    if (HAS_MASK) mask += (size_t)batch * mask_stride;
    float o[VALUE_CHUNKS + 1][4];
#pragma unroll
    for (int i = 0; i <= VALUE_CHUNKS; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    float top[2] = {NEVER, NEVER}, total[2] = {0.0f, 0.0f};

    const Sizes sizes = {lo, hi, n_blocks, key_row, value_row, key_gain_word, value_gain_word, min(end, n_units - 1)};
    // A turn has 2^turn_shift units.
    auto queries = [&](int unit) {
        return absorbed + ((size_t)(batch * n_turns + (unit >> turn_shift)) * n_groups + group) * KEY_CHUNKS * 32;
    };
    auto bias = [&](int unit) {  // offset and mean of columns 2c and 2c + 1
        return *(const float4*)(biases + ((size_t)(batch * n_turns + (unit >> turn_shift)) * n_groups + group) * 8 +
                                2 * c);
    };
    int unit = begin + pair;
#if STAGED_UNITS
    DYNAMIC_SHARED(u32, all_memory);
    u32* memory = all_memory + pair * STAGE_WORDS;
    if (unit < sizes.last_staged) {
        stage_keys(memory, key_words, kc, unit, key_row, 32 * side + lane);
        stage_values(memory, value_words, vc, unit, value_row, 32 * side + lane);
    }
    await_previous();
    if (unit < sizes.last_staged) stage_queries(memory, queries(unit), 32 * side + lane);
    commit();
    commit();  // elsewhere the one of the values
#else
    u32* memory = 0;
    await_previous();
#endif
#pragma unroll 1
    for (; unit < sizes.last_staged && !ALWAYS_CLAMP; unit += PAIRS)
        attend_unit<false, STAGED_UNITS>(
            o, top, total, key_words, value_words, kc, vc, queries(unit) + lane, bias(unit), mask, unit, sizes, memory,
            queries(min(unit + PAIRS, n_units - 1)), unit + PAIRS, lane, side, pair
        );
#pragma unroll 1
    for (; unit < end; unit += PAIRS)
        attend_unit<true, false>(
            o, top, total, key_words, value_words, kc, vc, queries(unit) + lane, bias(unit), mask, unit, sizes, memory,
            0, 0, lane, side, pair
        );
    let_next_begin();

    // The warps' sums, brought to one scale and added in turn.
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            total[i] += __shfl_xor_sync(0xffffffffu, total[i], step);
        }
        if (r == 0) {
            shared[warp][0][2 * c + i] = top[i];
            shared[warp][1][2 * c + i] = total[i];
            shared[warp][2][2 * c + i] = o[VALUE_CHUNKS][i];
        }
    }
    __syncthreads();
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float all = NEVER;
#pragma unroll
        for (int w = 0; w < WARPS; w++) all = fmaxf(all, shared[w][0][2 * c + i]);
        shrink[i] = exp_2(top[i] - all);
    }
    for (int w = 0; w < WARPS; w++) {
        if (w == warp)
#pragma unroll
            for (int i = 0; i < VALUE_CHUNKS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int at = (16 * i + r + 8 * (j / 2)) * 8 + 2 * c + j % 2;
                    shared_sums[at] = o[i][j] * shrink[j % 2] + (w ? shared_sums[at] : 0.0f);
                }
        __syncthreads();
    }
    const size_t entry = ((size_t)batch * n_groups + group) * gridDim.x + split;
    for (int i = threadIdx.x; i < 16 * VALUE_CHUNKS * 8; i += 32 * WARPS)
        sums[entry * (16 * VALUE_CHUNKS * 8) + i] = shared_sums[i];
    if (threadIdx.x < 8) {
        float all = NEVER, sum = 0.0f, sum_weighted = 0.0f;
        for (int w = 0; w < WARPS; w++) all = fmaxf(all, shared[w][0][threadIdx.x]);
        for (int w = 0; w < WARPS; w++) {
            const float e = exp_2(shared[w][0][threadIdx.x] - all);
            sum += e * shared[w][1][threadIdx.x];
            sum_weighted += e * shared[w][2][threadIdx.x];
        }
        stats[entry * 24 + threadIdx.x] = all;
        stats[entry * 24 + 8 + threadIdx.x] = sum;
        stats[entry * 24 + 16 + threadIdx.x] = sum_weighted;
    }
}

// ------------------------------------------------------------------------------------------------------------ combine

#define COMBINE_THREADS 1024
#define PARTS (COMBINE_THREADS / HEAD_DIM)
#define ROWS ((16 * VALUE_CHUNKS + PARTS - 1) / PARTS)
#define ITEMS ((16 * VALUE_CHUNKS * GROUP_COLUMNS + COMBINE_THREADS - 1) / COMBINE_THREADS)  // of a thread
#define AHEAD (ITEMS < 4 ? 4 / ITEMS : 1)  // splits whose sums a thread asks for before it knows how much they count

// The decoder's row of a component counted in whole chunks, or -1 if there is none.
__device__ __forceinline__ int row_of(int component, const Class* classes) {
    const int chunks[5] = {V16, V8, V4, V2, V1};
#pragma unroll
    for (int i = 0; i < 5; i++) {
        if (component < 16 * chunks[i]) return component < classes[i].count ? classes[i].row + component : -1;
        component -= 16 * chunks[i];
    }
    return -1;
}

// Grid: (KV heads, batch). out: [batch, 1, heads, HEAD_DIM]. exact_sums, exact_stats: see attend_exact. Shared:
// GROUP_COLUMNS * (splits + exact parts + 16 VALUE_CHUNKS + PARTS * HEAD_DIM) floats.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine(
    const float* stats, const float* sums, const float* exact_sums, const float2* exact_stats, const u16* decoder,
    const float* mean, const Class* value_classes, u16* out, int n_splits, int n_exact, int decoder_stride,
    int out_batch, int out_head, int has_mean
) {
    DYNAMIC_SHARED(float, memory);
    float* partial = memory;                                // [PARTS, GROUP_COLUMNS, HEAD_DIM]
    float* z = partial + PARTS * GROUP_COLUMNS * HEAD_DIM;  // [16 VALUE_CHUNKS, GROUP_COLUMNS]
    float* scale = z + 16 * VALUE_CHUNKS * GROUP_COLUMNS;   // [splits, GROUP_COLUMNS]
    float* exact_scale = scale + n_splits * GROUP_COLUMNS;  // [exact parts, GROUP_COLUMNS]
    __shared__ float all_total[GROUP_COLUMNS], all_weighted[GROUP_COLUMNS], packed_total[GROUP_COLUMNS];
    const int head = blockIdx.x, batch = blockIdx.y, n_kv_heads = gridDim.x;
    const int group = head / GROUP_HEADS, n_groups = n_kv_heads / GROUP_HEADS;
    const int column = head % GROUP_HEADS * GROUP_COLUMNS;
    const size_t entry = ((size_t)batch * n_groups + group) * n_splits;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // The decoder and the mean do not depend on anything: they are asked for first. Component k of this thread's is
    // row_of(part + PARTS k).
    const int part = threadIdx.x / HEAD_DIM % PARTS, dim = threadIdx.x % HEAD_DIM;
    u16 d[ROWS];
    {
        const u16* own = decoder + head * HEAD_DIM + dim;
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const int row = row_of(part + PARTS * k, value_classes + group * 5);
            d[k] = row >= 0 ? own[(size_t)row * decoder_stride] : (u16)0;
        }
    }
    const float own_mean = has_mean && part == 0 ? mean[head * HEAD_DIM + dim] : 0.0f;
    await_previous();
    // The rest before it is known how much it counts: exact parts lie where what is added to them will, sums of the
    // first splits are kept.
    exact_sums += (size_t)(batch * n_kv_heads + head) * n_exact * (GROUP_COLUMNS * HEAD_DIM);
    for (int i = threadIdx.x; i < min(n_exact, PARTS) * (GROUP_COLUMNS * HEAD_DIM / 4); i += COMBINE_THREADS)
        copy_16(shared_address(partial + 4 * i), exact_sums + 4 * i);
    commit();
    float ahead[ITEMS][AHEAD];
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
#pragma unroll
        for (int split = 0; split < AHEAD; split++) {
            const int i = item * COMBINE_THREADS + threadIdx.x;
            const bool there = i < 16 * VALUE_CHUNKS * GROUP_COLUMNS && split < n_splits;
            ahead[item][split] = there ? sums[((entry + split) * (16 * VALUE_CHUNKS) + i / GROUP_COLUMNS) * 8 + column +
                                              i % GROUP_COLUMNS]
                                       : 0.0f;
        }
    for (int g = warp; g < GROUP_COLUMNS; g += COMBINE_THREADS / 32) {
        const float2* exact = exact_stats + (batch * n_kv_heads + head) * n_exact * GROUP_COLUMNS + g;
        float top = NEVER, sum = 0.0f, sum_weighted = 0.0f, sum_exact = 0.0f;
        // A lane's own, relative to its own largest score: everything is read once.
        auto raise = [&](float to) {
            const float shrink = exp_2(top - to);
            sum *= shrink, sum_weighted *= shrink, sum_exact *= shrink;
            top = to;
        };
        for (int i = lane; i < n_splits; i += 32) {
            const float* own = stats + (entry + i) * 24 + column + g;
            const float score = own[0], total = own[8], weighted = own[16];
            raise(fmaxf(top, score));
            scale[i * GROUP_COLUMNS + g] = score;
            sum += exp_2(score - top) * total;
            sum_weighted += exp_2(score - top) * weighted;
        }
        for (int i = lane; i < n_exact; i += 32) {
            const float2 own = exact[i * GROUP_COLUMNS];
            raise(fmaxf(top, own.x));
            exact_scale[i * GROUP_COLUMNS + g] = own.x;
            sum_exact += exp_2(own.x - top + WEIGHT_BITS) * own.y;  // as the packed weights
        }
        float all = top;
#pragma unroll
        for (int step = 16; step; step /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, step));
        raise(all);
        for (int i = lane; i < n_splits; i += 32)
            scale[i * GROUP_COLUMNS + g] = exp_2(scale[i * GROUP_COLUMNS + g] - top);
        for (int i = lane; i < n_exact; i += 32)
            exact_scale[i * GROUP_COLUMNS + g] = exp_2(exact_scale[i * GROUP_COLUMNS + g] - top + WEIGHT_BITS);
#pragma unroll
        for (int step = 16; step; step /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, step);
            sum_weighted += __shfl_xor_sync(0xffffffffu, sum_weighted, step);
            sum_exact += __shfl_xor_sync(0xffffffffu, sum_exact, step);
        }
        if (lane == 0) {
            packed_total[g] = sum;
            all_total[g] = sum + sum_exact;
            all_weighted[g] = sum_weighted;
        }
    }
    wait<0>();
    __syncthreads();
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int i = item * COMBINE_THREADS + threadIdx.x;
        if (i >= 16 * VALUE_CHUNKS * GROUP_COLUMNS) break;
        const int g = i % GROUP_COLUMNS, component = i / GROUP_COLUMNS, chunk = component / 16;
        const float* from = sums + (entry * (16 * VALUE_CHUNKS) + component) * 8 + column + g;
        float sum = 0.0f;
#pragma unroll
        for (int split = 0; split < AHEAD; split++)
            if (split < n_splits) sum += scale[split * GROUP_COLUMNS + g] * ahead[item][split];
#pragma unroll(2 * AHEAD)
        for (int split = AHEAD; split < n_splits; split++)
            sum += scale[split * GROUP_COLUMNS + g] * from[(size_t)split * (16 * VALUE_CHUNKS * 8)];
        const float offset = chunk < V16                  ? 0.0f
                             : chunk < V16 + V8           ? 127.5f
                             : chunk < V16 + V8 + V4      ? 7.5f
                             : chunk < V16 + V8 + V4 + V2 ? 1.5f
                                                          : 0.5f;
        const bool there = row_of(component, value_classes + group * 5) >= 0;
        z[i] = !there ? 0.0f : chunk < V16 ? sum : sum * CODE_SCALE - offset * all_weighted[g];
    }
    __syncthreads();
    if (threadIdx.x < PARTS * HEAD_DIM) {
        float value[GROUP_COLUMNS];
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++) value[g] = packed_total[g] * own_mean;
        for (int k = part; k < n_exact; k += PARTS)
#pragma unroll
            for (int g = 0; g < GROUP_COLUMNS; g++)
                value[g] += exact_scale[k * GROUP_COLUMNS + g] *
                            (k == part ? partial : exact_sums)[(k * GROUP_COLUMNS + g) * HEAD_DIM + dim];
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const float x = from_half(d[k]);
            if (part + PARTS * k < 16 * VALUE_CHUNKS)
#pragma unroll
                for (int g = 0; g < GROUP_COLUMNS; g++) value[g] += z[(part + PARTS * k) * GROUP_COLUMNS + g] * x;
        }
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++) partial[(part * GROUP_COLUMNS + g) * HEAD_DIM + dim] = value[g];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HEAD_DIM * GROUP_COLUMNS; i += COMBINE_THREADS) {
        const int dim = i % HEAD_DIM, g = i / HEAD_DIM;
        float value = 0.0f;
#pragma unroll
        for (int k = 0; k < PARTS; k++) value += partial[k * GROUP_COLUMNS * HEAD_DIM + i];
        const float total = all_total[g];
        out[(size_t)batch * out_batch + (head * GROUP_COLUMNS + g) * out_head + dim] =
            stored(total > 0.0f ? value / total : 0.0f);
    }
}
