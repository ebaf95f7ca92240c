// Decode attention over a packed cache whose keys are un-rotated turn by turn: three launches, compiled by NVRTC.
//
// 1. prepare: q' = D^T R_-c q for every turn, laid out as the matrix units want it; attention over exact tokens.
// 2. attend: a warp scores 64 or 128 packed tokens of one group of KV heads at a time, online softmax, value sums.
// 3. combine: splits added up, values decoded, joined with the exact tokens.
//
// From compute capability 9.0 on, attend may begin while prepare ends, and combine while attend ends: each of their
// thread blocks, whatever it has to do, waits for the launch before it (await_previous) before it reads what that one
// wrote, or writes anything. So combine ends after attend has, and attend after prepare has. prepare is launched
// plainly: it begins after all that came before it has ended, and may write where launches of an earlier layer read.
//
// Compile-time constants, defined in front of this text by turned.py:
//   HEAD_DIM; GROUP_HEADS, GROUP_COLUMNS: KV heads of a group, query heads of a KV head; their product is at most 8.
//   KF KN KP KS, VF VN VP VS: sets of 32 components of each class, the most of any group. Classes: F, float16 numbers;
//   N, nibbles (a component of 8 bits is two of them); P, pairs of bits; S, single bits.
//   KEY_WORDS, VALUE_WORDS: of a group in a row, the most of any. KEY_HOLES, VALUE_HOLES: 1 where a set of F of some
//   group is not full. WARPS: of a thread block of `attend`; BLOCKS: packed blocks that a warp takes at once, its unit.
//   KEY_GAIN, VALUE_GAIN, HAS_MASK: 0 or 1. QUERY_BF16: 1 for
//   bfloat16 queries, keys, values and outputs, 0 for float16.
//
// The row of a block of 32 tokens is in the order in which lanes load it (docs/format.md, tiles): a word is a row of an
// operand of mma.m16n8k32 once it is masked, lane = 4 r + c. Codes stay where they are in their bytes, times 1 and 16
// for the two halves of the rows of scores, times powers of two for the rows of value sums; what they are multiplied by
// (absorbed queries, weights) are 16-bit fixed-point numbers in two 8-bit halves.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define KEY_SETS (KF + KN + KP + KS)
#define VALUE_SETS (VF + VN + VP + VS)
#define KEY_CODES (KN + KP + KS > 0)
#define VALUE_CODES (VN + VP + VS > 0)
#define PREPARE_WARPS 4
#define EXACT_TOKENS 32  // of a thread block: as many as a warp has lanes
#define EXACT_PARTS(TOKENS) (((TOKENS) + EXACT_TOKENS - 1) / EXACT_TOKENS)
#define RING 4
#define NEVER (-1e30f)       // stands for -inf: differences of two stay finite
#define QUERY_SCALE 64.0f    // of absorbed queries as float16 numbers, so that the smallest stay normal
#define WEIGHT_SCALE 256.0f  // of weights as float16 numbers, for the same reason
// Weights as fixed-point numbers: the largest, times the largest gain 2^2.75, is below 2^16. Sums of 128 of them times
// codes of at most 255 are below 2^31.
#define WEIGHT_ONE (VALUE_GAIN ? 9736.0f : 65500.0f)
// The largest absorbed query, so that sums over all components, codes in place, are below 2^31 too.
#define CODE_SUM (32.0f * (240.0f * KN + 48.0f * KP + 16.0f * KS))
#define QUERY_ONE (CODE_SUM * 32767.0f < 2147000000.0f ? 32767.0f : 2147000000.0f / CODE_SUM)

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

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// u8 codes times s8 or u8 numbers.
__device__ __forceinline__ void mma_signed(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_unsigned(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
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

// The compiler would work these out anew for every access.
__device__ __forceinline__ void pin(u32& to, const char*& from) { asm volatile("" : "+r"(to), "+l"(from)); }

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
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

// What a row of the packed cache holds of one group: where it begins and how many words it has; where its classes N, P
// and S begin in it (F is the first); its components of class F.
struct Group {
    int first, words, n, p, s, numbers;
};

// ------------------------------------------------------------------------------------------------------------ prepare

#define STEPS (HEAD_DIM / 32)  // products of 16 dimensions for each half of a head
#define TURN_ROWS (16 / (GROUP_COLUMNS <= 1 ? 1 : GROUP_COLUMNS <= 2 ? 2 : GROUP_COLUMNS <= 4 ? 4 : 8))  // turns a warp
#define PADDED_COLUMNS (16 / TURN_ROWS)

// Offset of the codes of a set: 2^(bits - 1) - 1/2.
__device__ __forceinline__ float offset_of(int set, int numbers, int nibbles, int pairs) {
    return set < numbers ? 0.0f : set < numbers + nibbles ? 7.5f : set < numbers + nibbles + pairs ? 1.5f : 0.5f;
}

// One thread block: the queries of one KV head, turned back for TURN_ROWS turns in each warp. decoder: of all
// heads, as the second factor of products: [KV heads, KEY_SETS, 4 tiles, 2 STEPS, 32 lanes] of 4 float16 numbers;
// halves of sets pass through `memory`, RING of them at a time.
__device__ __forceinline__ void absorb(
    int task, const u16* query, const uint2* decoder, const float* key_mean, const float2* angles, u32* absorbed,
    float4* biases, int n_turns, int n_kv_heads, int q_batch, int q_head, int angle_batch, float scale, uint2* memory
) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int parts = (n_turns + TURN_ROWS * PREPARE_WARPS - 1) / (TURN_ROWS * PREPARE_WARPS);
    const int head = task / parts % n_kv_heads, batch = task / parts / n_kv_heads;
    const int group = head / GROUP_HEADS, n_groups = n_kv_heads / GROUP_HEADS;
    const int chunk_size = 4 * STEPS * 32, n_chunks = 2 * KEY_SETS;  // halves of sets, in uint2
    decoder += head * (n_chunks * chunk_size);
    const float to_stored = scale * QUERY_SCALE;
    u32 to = shared_address(memory) + 16 * threadIdx.x;
    const char* source = (const char*)decoder + 16 * threadIdx.x;
    pin(to, source);
    auto fetch = [&](int chunk) {
        const int pieces = chunk < n_chunks ? chunk_size / 2 - threadIdx.x : 0;
#pragma unroll
        for (int i = 0; i < chunk_size / 2; i += 32 * PREPARE_WARPS)
            if (i < pieces) copy_16(to + chunk % RING * (8 * chunk_size) + 16 * i, source + 16 * i);
        source += 8 * chunk_size;
        commit();
    };
#pragma unroll
    for (int chunk = 0; chunk < RING - 1; chunk++) fetch(chunk);
    u32 q[2 * STEPS][4];
    int place[2];
    bool wanted[2];
    float bias[2] = {0.0f, 0.0f}, mean[2] = {0.0f, 0.0f}, largest[2] = {0.0f, 0.0f};
    int entry[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = r + 8 * half;
        const int turn = (task % parts * PREPARE_WARPS + threadIdx.x / 32) * TURN_ROWS + row / PADDED_COLUMNS,
                  own = row % PADDED_COLUMNS;
        wanted[half] = turn < n_turns && own < GROUP_COLUMNS;
        const int column = head % GROUP_HEADS * GROUP_COLUMNS + own;
        entry[half] = ((batch * n_turns + turn) * n_groups + group) * 8 + column;
        place[half] = (((batch * n_turns + turn) * n_groups + group) * KEY_SETS * 32 + column * 4 + c) * 4;
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
#pragma unroll 1
    for (int chunk = 0; chunk < n_chunks; chunk++) {
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
        const float offset = offset_of(chunk / 2, KF, KN, KP);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x[4], sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[i] = clamped(d[i / 2][2 * half + i % 2] * to_stored);
                sum += x[i];
                if (chunk >= 2 * KF) largest[half] = fmaxf(largest[half], fabsf(x[i]));
            }
            bias[half] += offset * sum;
            if (wanted[half])
                *(uint2*)(absorbed + place[half] + chunk / 2 * 128 + chunk % 2 * 2) =
                    make_uint2(to_half2(x[0], x[1]), to_half2(x[2], x[3]));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            bias[half] += __shfl_xor_sync(0xffffffffu, bias[half], step);
            mean[half] += __shfl_xor_sync(0xffffffffu, mean[half], step);
            largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], step));
        }
        // a little more than the largest, which float16 numbers may have been rounded up from
        const float unit = largest[half] * 1.001f / QUERY_ONE;
        if (wanted[half] && c == 0)
            biases[entry[half]] = make_float4(
                unit / QUERY_SCALE, bias[half] / QUERY_SCALE, mean[half] * scale, unit > 0.0f ? 1.0f / unit : 0.0f
            );
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
        for (int i = 0; i < EXACT_TOKENS * row; i += threads) {
            const int piece = i + threadIdx.x, token = min(first + piece / row, n - 1);
            if (piece >= EXACT_TOKENS * row) break;
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
                dot[round][g] +=
                    number(q.x & 0xffff) * number(k[round].x & 0xffff) + number(q.x >> 16) * number(k[round].x >> 16) +
                    number(q.y & 0xffff) * number(k[round].y & 0xffff) + number(q.y >> 16) * number(k[round].y >> 16);
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
// absorbed: [batch, n_turns, groups, KEY_SETS, 32 lanes], eight float16 numbers, times QUERY_SCALE; biases: [batch,
// n_turns, groups, 8]: the unit of these numbers as fixed-point ones, what offsets and what the mean add to a score,
// and what the float16 numbers are multiplied by to become fixed-point ones.
extern "C" __global__ void __launch_bounds__(32 * PREPARE_WARPS) prepare(
    const u16* query, const uint2* decoder, const float* key_mean, const float2* angles, const int* last, u32* absorbed,
    float4* biases, const u16* sink_keys, const u16* sink_values, const u16* keys, const u16* values,
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

// Words of one warp in shared memory: a unit of keys and one of values, gains of the keys, and of the values of this
// unit and the next; the queries of a turn.
#define UNIT_TOKENS (32 * BLOCKS)
#define VALUES_AT (BLOCKS * KEY_WORDS)
#define GAINS_AT (VALUES_AT + BLOCKS * VALUE_WORDS)
#define QUERIES_AT (GAINS_AT + 12 * BLOCKS)
#define STAGE_WORDS (QUERIES_AT + 128 * KEY_SETS)
// What is read of quads that sets lack lies in front of here, or within so many words beyond the last warp's memory.
#define BEYOND (128 * (VALUE_SETS > KEY_SETS ? VALUE_SETS - KEY_SETS + 1 : 1))

// What is the same for all units of a warp. key_words, value_words: of the sequence, from the group's first word on;
// memory: the warp's. A turn has 2^turn_shift units.
struct Site {
    const u32 *key_words, *value_words;
    const uint4* absorbed;
    const float4* biases;
    int key_row, value_row, key_pieces, value_pieces, key_gain_word, value_gain_word, n_blocks, turn_shift, turn_stride;
    u32* memory;
};

// The group's words of a unit's blocks; a last unit without all of them repeats the last. MOST, pieces: of 16 bytes.
template <int MOST>
__device__ __forceinline__ void stage(
    u32* to, const u32* words, int unit, int row, int pieces, int n_blocks, int lane
) {
    u32 place = shared_address(to) + 16 * lane;
    const char* from = (const char*)(words + (size_t)(unit * BLOCKS) * row) + 16 * lane;
    pin(place, from);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < MOST; i += 32)
            if (i + lane < pieces) copy_16(place + 16 * (b * MOST + i), from + 16 * i);
        if (unit * BLOCKS + b + 1 < n_blocks) from += 4 * row;
    }
}

// Keys of a unit, and the gains of keys and values, these into the half of their place that `phase` says.
__device__ __forceinline__ void stage_keys(const Site& site, int unit, int phase, int lane) {
    stage<KEY_WORDS / 4>(site.memory, site.key_words, unit, site.key_row, site.key_pieces, site.n_blocks, lane);
    u32* gains = site.memory + GAINS_AT;
    if (KEY_GAIN) stage<1>(gains, site.key_words + site.key_gain_word, unit, site.key_row, 1, site.n_blocks, lane);
    if (VALUE_GAIN)
        stage<1>(
            gains + 4 * BLOCKS * (1 + phase), site.value_words + site.value_gain_word, unit, site.value_row, 1,
            site.n_blocks, lane
        );
}

__device__ __forceinline__ void stage_queries(const Site& site, int turn, int lane) {
    const uint4* from = site.absorbed + (size_t)turn * site.turn_stride * (KEY_SETS * 32) + lane;
    const u32 place = shared_address(site.memory + QUERIES_AT) + 16 * lane;
#pragma unroll
    for (int set = 0; set < KEY_SETS; set++) copy_16(place + 512 * set, from + 32 * set);
}

__device__ __forceinline__ void stage_values(const Site& site, int unit, int lane) {
    stage<VALUE_WORDS / 4>(
        site.memory + VALUES_AT, site.value_words, unit, site.value_row, site.value_pieces, site.n_blocks, lane
    );
}

// Bytes 0 (or 1) of four integers.
__device__ __forceinline__ u32 four_bytes(const u32 (&x)[4], bool second) {
    const u32 pick = second ? 0x51 : 0x40;
    return __byte_perm(__byte_perm(x[0], x[1], pick), __byte_perm(x[2], x[3], pick), 0x5410);
}

// This lane's queries for sets of codes, from float16 to fixed-point numbers: the high bytes of eight, then the low.
__device__ __forceinline__ void round_queries(uint4* queries, float inverse) {
#pragma unroll
    for (int set = KF; set < KEY_SETS; set++) {
        const uint4 all = queries[32 * set];
        const u32 two[4] = {all.x, all.y, all.z, all.w};
        u32 x[2][4];  // rounded in the mantissa of 1.5 * 2^23, whose low bytes are those of the integer
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i / 4][i % 4] =
                __float_as_uint(from_half(i % 2 ? two[i / 2] >> 16 : two[i / 2] & 0xffff) * inverse + 12582912.0f);
        queries[32 * set] = make_uint4(
            four_bytes(x[0], true), four_bytes(x[1], true), four_bytes(x[0], false), four_bytes(x[1], false)
        );
    }
}

// The gains of tokens 8 i + r of a block, i = 0..3: their codes in the mantissa of 2^23, cheaper than a conversion.
__device__ __forceinline__ void read_gains(float (&gains)[4], const u32* words, int r) {
    const uint4 four = *(const uint4*)words;
    const u32 word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        gains[i] = exp_2(__uint_as_float(((word[i] >> (4 * r)) & 15) | 0x4b000000u) * 0.25f - 2097153.0f);
}

// Where a lane's words of the classes of a block begin.
struct Lane {
    const u32 *f, *n, *p, *s;
};

// Scores of a block in units of the queries: of token 16 t + 8 h + r and column 2 c + k in [t][2 h + k], those of h = 1
// times 16. numbers: what the class of float16 numbers adds, times QUERY_SCALE. at: words of blocks before this one.
__device__ __forceinline__ void score_block(
    int (&codes)[2][4], float (&numbers)[2][4], const Lane& from, const Group& group, const uint4* queries, int at,
    int r, int c
) {
    int high[2][4], low[2][4];
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) high[t][i] = low[t][i] = 0, numbers[t][i] = 0.0f;
#pragma unroll
    for (int set = 0; set < KF; set++) {
        const uint4 q = queries[32 * set];
#pragma unroll
        for (int step = 0; step < 2; step++) {
            // Lane c takes the pairs of components c and c + 4 of each half of the set.
            const int pair = 16 * set + 8 * step;
            uint4 x = make_uint4(0, 0, 0, 0), y = x;  // what follows the last pair might be no number
            if (!KEY_HOLES || 2 * (pair + c) < group.numbers) x = *(const uint4*)(from.f + at + 32 * pair);
            if (!KEY_HOLES || 2 * (pair + 4 + c) < group.numbers) y = *(const uint4*)(from.f + at + 32 * (pair + 4));
            const u32 b0 = step ? q.z : q.x, b1 = step ? q.w : q.y;
            mma(numbers[0], x.x, x.y, y.x, y.y, b0, b1);
            mma(numbers[1], x.z, x.w, y.z, y.w, b0, b1);
        }
    }
#pragma unroll
    for (int set = KF; set < KEY_SETS; set++) {
        const uint4 q = queries[32 * set];
        u32 even[2], odd[2];  // this lane's quads, of the tokens' two halves t
        u32 keep = 0x0f0f0f0fu;
        if (set < KF + KN) {
            const u32* own = from.n + at + 128 * (set - KF);
            const uint2 x = *(const uint2*)own, y = *(const uint2*)(own + 64);
            even[0] = x.x, even[1] = x.y, odd[0] = y.x, odd[1] = y.y;
        } else if (set < KF + KN + KP) {
            const u32* own = from.p + at + 64 * (set - KF - KN);
            const u32 x = own[0], y = own[32];
            keep = 0x03030303u;
            even[0] = x, even[1] = x >> 2, odd[0] = y, odd[1] = y >> 2;
        } else {
            const u32* own = from.s + at + 32 * (set - KF - KN - KP);
            const u32 x = own[0] >> (2 * (r & 1)), y = own[16] >> (2 * (r & 1));
            keep = 0x01010101u;
            even[0] = x, even[1] = x >> 1, odd[0] = y, odd[1] = y >> 1;
        }
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const u32 a0 = even[t] & keep, a1 = even[t] & (keep << 4), a2 = odd[t] & keep, a3 = odd[t] & (keep << 4);
            mma_signed(high[t], a0, a1, a2, a3, q.x, q.y);
            mma_unsigned(low[t], a0, a1, a2, a3, q.z, q.w);
        }
    }
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) codes[t][i] = high[t][i] * 256 + low[t][i];
}

// Weights of a block: of fixed-point numbers the high and the low bytes, of float16 numbers two tokens a word; the
// tokens are 16 t + 2 c, 16 t + 2 c + 1, 16 t + 8 + 2 c and 16 t + 8 + 2 c + 1, of column r.
struct Weights {
    u32 high[2], low[2], numbers[2][2];
};

// Sums of a set of class F over the tokens of a unit: of component 4 r + 2 j + h and column 2 c + k into [j][2 h + k].
__device__ __forceinline__ void sum_numbers(
    float (&sums)[2][4], const Weights (&weights)[BLOCKS], const u32* from, const Group& group, int set, int r, int c
) {
    const int quad = 8 * set + r;
    const bool there = !VALUE_HOLES || 4 * quad < group.numbers;
    const u32* own = from + 64 * quad + 4 * c;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][i] = 0.0f;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int t = 0; t < 2; t++) {
                uint4 x = make_uint4(0, 0, 0, 0);  // what follows the last quad might be no number
                if (there) x = *(const uint4*)(own + b * VALUE_WORDS + 32 * j + 16 * (t ^ (r & 1)));
                mma(sums[j], x.x, x.y, x.z, x.w, weights[b].numbers[t][0], weights[b].numbers[t][1]);
            }
}

// The same of a set of codes, as integers times the unit of the weights and what place a code has in its byte.
template <int BITS>
__device__ __forceinline__ void sum_codes(int (&sums)[2][4], const Weights (&weights)[BLOCKS], const u32* from) {
    int high[2][4], low[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) high[j][i] = low[j][i] = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        const u32* own = from + b * VALUE_WORDS;
        u32 x[2][2];  // [j][t]
        if (BITS == 4) {
            const uint4 four = *(const uint4*)own;
            x[0][0] = four.x, x[1][0] = four.y, x[0][1] = four.z, x[1][1] = four.w;
        } else if (BITS == 2) {
            const uint2 two = *(const uint2*)own;
            x[0][0] = x[1][0] = two.x, x[0][1] = x[1][1] = two.y;
        } else {
            x[0][0] = x[1][0] = *own, x[0][1] = x[1][1] = *own >> 4;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const u32 keep = (BITS == 4   ? 0x0f0f0f0fu
                              : BITS == 2 ? 0x03030303u
                                          : 0x01010101u)
                             << (BITS == 4 ? 0 : 2 * BITS * j);
            const u32 a0 = x[j][0] & keep, a1 = x[j][0] & (keep << BITS), a2 = x[j][1] & keep,
                      a3 = x[j][1] & (keep << BITS);
            mma_unsigned(high[j], a0, a1, a2, a3, weights[b].high[0], weights[b].high[1]);
            mma_unsigned(low[j], a0, a1, a2, a3, weights[b].low[0], weights[b].low[1]);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][i] = high[j][i] * 256 + low[j][i];
}

// What a warp has seen of its columns 2 c and 2 c + 1: the largest score, the sum of weights, that of weights times
// gains (all lanes c of a column hold it), value sums. total: of this lane's rows only.
struct State {
    float top[2], total[2], weighted[2], sums[VALUE_SETS][8];
};

// A unit of tokens. As soon as its keys are done with, those of unit `next` are asked for, and so with its values.
// new_turn: whether the queries are new ones. phase: 0 and 1 in turn.
__device__ __forceinline__ void attend_unit(
    State& state, const Site& site, const Group& keys, const Group& values, const Lane& key_lane,
    const Lane& value_lane, const u8* mask, int unit, int next, bool new_turn, int lo, int hi, int phase, int lane
) {
    const int r = lane / 4, c = lane % 4;
    const float4* own_biases = site.biases + (size_t)(unit >> site.turn_shift) * site.turn_stride * 8 + 2 * c;
    const float4 bias[2] = {own_biases[0], own_biases[1]};
    const float inverse = new_turn && KEY_CODES ? own_biases[r - 2 * c].w : 0.0f;
    wait<1>();
    if (new_turn && KEY_CODES) round_queries((uint4*)(site.memory + QUERIES_AT) + lane, inverse);
    __syncwarp();
    const u32* memory = site.memory;
    float s[BLOCKS][2][4];  // of each block: of token 16 t + 8 h + r and column 2 c + k in [t][2 h + k]
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        int codes[2][4];
        float numbers[2][4], gain[4];
        score_block(codes, numbers, key_lane, keys, (const uint4*)(memory + QUERIES_AT) + lane, b * KEY_WORDS, r, c);
        if (KEY_GAIN) read_gains(gain, memory + GAINS_AT + 4 * b, r);
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4& own = bias[i % 2];
                float x = -own.y;
                if (KEY_CODES) x += (float)codes[t][i] * (i / 2 ? own.x * (1.0f / 16.0f) : own.x);
                if (KF) x += numbers[t][i] * (1.0f / QUERY_SCALE);
                s[b][t][i] = x * (KEY_GAIN ? gain[2 * t + i / 2] : 1.0f) + own.z;
            }
    }
    __syncwarp();
    if (next >= 0) {
        stage_keys(site, next, 1 - phase, lane);
        if (next >> site.turn_shift != unit >> site.turn_shift) stage_queries(site, next >> site.turn_shift, lane);
    }
    commit();

    if (HAS_MASK || unit * UNIT_TOKENS < lo || unit * UNIT_TOKENS + UNIT_TOKENS > hi) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int t = 0; t < 2; t++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int token = unit * UNIT_TOKENS + 32 * b + 16 * t + 8 * h + r;
                    bool seen = token >= lo && token < hi;
                    if (HAS_MASK) seen = seen && mask[token] != 0;
                    if (!seen) s[b][t][2 * h] = s[b][t][2 * h + 1] = NEVER;
                }
    }
    float high[2] = {NEVER, NEVER};
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) high[i % 2] = fmaxf(high[i % 2], s[b][t][i]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
#pragma unroll
        for (int k = 0; k < 2; k++) high[k] = fmaxf(high[k], __shfl_xor_sync(0xffffffffu, high[k], step));
    // Weights are relative to the unit's own largest score, sums to the largest so far. Where nothing was seen, weights
    // must be 0 and not 1.
    float base[2], factor[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const float now = fmaxf(state.top[k], high[k]);
        base[k] = high[k] == NEVER ? 0.0f : high[k];
        factor[k] = high[k] == NEVER ? 0.0f : exp_2(high[k] - now);
        high[k] = exp_2(state.top[k] - now);  // what older sums shrink by
        state.top[k] = now;
    }
    if (__any_sync(0xffffffffu, high[0] != 1.0f || high[1] != 1.0f)) {
#pragma unroll
        for (int k = 0; k < 2; k++) state.total[k] *= high[k], state.weighted[k] *= high[k];
#pragma unroll
        for (int set = 0; set < VALUE_SETS; set++)
#pragma unroll
            for (int i = 0; i < 8; i++) state.sums[set][i] *= high[i % 2];
    }
    Weights weights[BLOCKS];
    float total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        float gain[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if (VALUE_GAIN) read_gains(gain, memory + GAINS_AT + 4 * BLOCKS * (1 + phase) + 4 * b, r);
#pragma unroll
        for (int t = 0; t < 2; t++) {
            u32 fixed[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float x = exp_2(s[b][t][2 * h] - base[0]), y = exp_2(s[b][t][2 * h + 1] - base[1]);
                total[0] += x;
                total[1] += y;
                const float g = gain[2 * t + h];
                if (VALUE_CODES) {  // rounded in the mantissa of 2^23
                    const float unit_gain = g * WEIGHT_ONE;
                    fixed[h] = transposed(__byte_perm(
                        __float_as_uint(x * unit_gain + 8388608.0f), __float_as_uint(y * unit_gain + 8388608.0f), 0x5410
                    ));
                }
                if (VF) weights[b].numbers[t][h] = transposed(to_half2(x * g * WEIGHT_SCALE, y * g * WEIGHT_SCALE));
            }
            if (VALUE_CODES) {
                weights[b].high[t] = __byte_perm(fixed[0], fixed[1], 0x7531);
                weights[b].low[t] = __byte_perm(fixed[0], fixed[1], 0x6420);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        state.total[k] += total[k] * factor[k];
        factor[k] *= 1.0f / WEIGHT_ONE;
    }
    wait<1>();
    __syncwarp();
#pragma unroll
    for (int set = 0; set < VF; set++) {
        float sums[2][4];
        sum_numbers(sums, weights, value_lane.f, values, set, r, c);
#pragma unroll
        for (int i = 0; i < 8; i++)
            state.sums[set][i] += sums[i / 4][i % 4] * (factor[i % 2] * (WEIGHT_ONE / WEIGHT_SCALE));
    }
#pragma unroll
    for (int set = VF; set < VALUE_SETS; set++) {
        int sums[2][4];
        if (set < VF + VN)
            sum_codes<4>(sums, weights, value_lane.n + 128 * (set - VF));
        else if (set < VF + VN + VP)
            sum_codes<2>(sums, weights, value_lane.p + 64 * (set - VF - VN));
        else
            sum_codes<1>(sums, weights, value_lane.s + 32 * (set - VF - VN - VP));
#pragma unroll
        for (int i = 0; i < 8; i++) state.sums[set][i] += (float)sums[i / 4][i % 4] * factor[i % 2];
    }
    if (VALUE_CODES) {  // the sum of weights as they were rounded: what the codes' offsets are to be multiplied by
        int upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
        const u32 one = 0x01010101u;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            mma_unsigned(upper, one, one, one, one, weights[b].high[0], weights[b].high[1]);
            mma_unsigned(lower, one, one, one, one, weights[b].low[0], weights[b].low[1]);
        }
#pragma unroll
        for (int k = 0; k < 2; k++) state.weighted[k] += (float)(upper[k] * 256 + lower[k]) * factor[k];
    }
    __syncwarp();
    if (next >= 0) stage_values(site, next, lane);
    commit();
}

// Grid: (splits, groups, batch). Splits share the units of a sequence, and a split's warps its own. stats: [batch,
// groups, splits, 3, 8]: largest score, sum of weights, sum of weights times gains; sums: [batch, groups, splits,
// 32 VALUE_SETS, 8], codes times what place they have in their bytes. Shared: WARPS * STAGE_WORDS + BEYOND words, and
// at least WARPS * 256 VALUE_SETS.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) attend(
    const u32* key_words, const u32* value_words, const Group* key_groups, const Group* value_groups,
    const uint4* absorbed, const float4* biases, const int* first, const int* last, const u8* mask, float* stats,
    float* sums, int n_blocks, int n_turns, int turn_shift, int key_row, int value_row, int key_blocks,
    int value_blocks, int key_gain_word, int value_gain_word, int mask_stride
) {
    DYNAMIC_SHARED(u32, all_memory);
    __shared__ float shared[WARPS][3][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4, r = lane / 4;
    const int split = blockIdx.x, group = blockIdx.y, batch = blockIdx.z, n_groups = gridDim.y;
    const Group keys = key_groups[group], values = value_groups[group];
    const int lo = first[batch], hi = min(last[batch], n_blocks * 32);
    // Splits share what counts of this sequence, however long the others are.
    const int start = lo / UNIT_TOKENS, n_used = max((hi + UNIT_TOKENS - 1) / UNIT_TOKENS - start, 0);
    const int begin = n_used * split / gridDim.x, n_own = n_used * (split + 1) / gridDim.x - begin;
    const int from = start + begin + n_own * warp / WARPS, end = start + begin + n_own * (warp + 1) / WARPS;
    if (HAS_MASK) mask += (size_t)batch * mask_stride;
    u32* memory = all_memory + warp * STAGE_WORDS;
    const Site site = {
        key_words + (size_t)batch * key_blocks * key_row + keys.first,
        value_words + (size_t)batch * value_blocks * value_row + values.first,
        absorbed + (size_t)(batch * n_turns * n_groups + group) * (KEY_SETS * 32),
        biases + (size_t)(batch * n_turns * n_groups + group) * 8,
        key_row,
        value_row,
        keys.words / 4,
        values.words / 4,
        key_gain_word - keys.first,
        value_gain_word - values.first,
        n_blocks,
        turn_shift,
        n_groups,
        memory,
    };
    const Lane key_lane = {
        memory + 32 * c + 4 * ((r + 2 * c) & 7), memory + keys.n + 16 * c + 2 * (r ^ ((c & 2) << 1)),
        memory + keys.p + 8 * c + r, memory + keys.s + 4 * c + r / 2
    };
    u32* own_values = memory + VALUES_AT;
    const Lane value_lane = {
        own_values, own_values + values.n + 16 * r + 4 * c, own_values + values.p + 8 * r + 2 * c,
        own_values + values.s + 4 * r + c
    };
    State state;
#pragma unroll
    for (int k = 0; k < 2; k++) state.top[k] = NEVER, state.total[k] = state.weighted[k] = 0.0f;
#pragma unroll
    for (int set = 0; set < VALUE_SETS; set++)
#pragma unroll
        for (int i = 0; i < 8; i++) state.sums[set][i] = 0.0f;
    if (from < end) {
        stage_keys(site, from, 0, lane);
        stage_values(site, from, lane);
    }
    await_previous();
    if (from < end) stage_queries(site, from >> turn_shift, lane);
    commit();
    commit();  // elsewhere the one of the values
    int phase = 0;
#pragma unroll 1
    for (int unit = from; unit < end; unit++, phase ^= 1)
        attend_unit(
            state, site, keys, values, key_lane, value_lane, mask, unit, unit + 1 < end ? unit + 1 : -1,
            unit == from || unit % (1 << turn_shift) == 0, lo, hi, phase, lane
        );
    let_next_begin();

    // The warps' sums, brought to one scale and added up.
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) state.total[k] += __shfl_xor_sync(0xffffffffu, state.total[k], step);
        if (r == 0) {
            shared[warp][0][2 * c + k] = state.top[k];
            shared[warp][1][2 * c + k] = state.total[k];
            shared[warp][2][2 * c + k] = state.weighted[k];
        }
    }
    __syncthreads();  // and nobody needs its units any longer
    float2* shared_sums = (float2*)all_memory;
    float shrink[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float all = NEVER;
#pragma unroll
        for (int w = 0; w < WARPS; w++) all = fmaxf(all, shared[w][0][2 * c + k]);
        shrink[k] = exp_2(state.top[k] - all);
    }
#pragma unroll
    for (int set = 0; set < VALUE_SETS; set++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            shared_sums[warp * (128 * VALUE_SETS) + (32 * set + 4 * r + i) * 4 + c] =
                make_float2(state.sums[set][2 * i] * shrink[0], state.sums[set][2 * i + 1] * shrink[1]);
    __syncthreads();
    const size_t entry = ((size_t)batch * n_groups + group) * gridDim.x + split;
    for (int i = threadIdx.x; i < 128 * VALUE_SETS; i += 32 * WARPS) {
        float2 all = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 x = shared_sums[w * (128 * VALUE_SETS) + i];
            all.x += x.x, all.y += x.y;
        }
        ((float2*)sums)[entry * (128 * VALUE_SETS) + i] = all;
    }
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
#define COMPONENTS (32 * VALUE_SETS)
#define ROWS ((COMPONENTS + PARTS - 1) / PARTS)
#define ITEMS ((COMPONENTS * GROUP_COLUMNS + COMBINE_THREADS - 1) / COMBINE_THREADS)  // of a thread
#define AHEAD (ITEMS < 4 ? 4 / ITEMS : 1)  // splits whose sums a thread asks for before it knows how much they count

// What place a code has in its byte, the other way round.
__device__ __forceinline__ float place_of(int component) {
    const int set = component / 32, place = component % 4;
    const int bits = set < VF ? 0 : set < VF + VN ? 4 * (place % 2) : set < VF + VN + VP ? 2 * place : place;
    return __uint_as_float((127 - bits) << 23);
}

// Grid: (KV heads, batch). decoder: [KV heads, COMPONENTS, HEAD_DIM], rows of components that are not there 0. out:
// [batch, 1, heads, HEAD_DIM]. exact_sums, exact_stats: see attend_exact. Shared: GROUP_COLUMNS * (splits + exact parts
// + COMPONENTS + PARTS * HEAD_DIM) floats.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine(
    const float* stats, const float* sums, const float* exact_sums, const float2* exact_stats, const u16* decoder,
    const float* mean, u16* out, int n_splits, int n_exact, int out_batch, int out_head, int has_mean
) {
    DYNAMIC_SHARED(float, memory);
    float* partial = memory;                                // [PARTS, GROUP_COLUMNS, HEAD_DIM]
    float* z = partial + PARTS * GROUP_COLUMNS * HEAD_DIM;  // [COMPONENTS, GROUP_COLUMNS]
    float* scale = z + COMPONENTS * GROUP_COLUMNS;          // [splits, GROUP_COLUMNS]
    float* exact_scale = scale + n_splits * GROUP_COLUMNS;  // [exact parts, GROUP_COLUMNS]
    __shared__ float all_total[GROUP_COLUMNS], all_weighted[GROUP_COLUMNS], packed_total[GROUP_COLUMNS];
    const int head = blockIdx.x, batch = blockIdx.y, n_kv_heads = gridDim.x;
    const int group = head / GROUP_HEADS, n_groups = n_kv_heads / GROUP_HEADS;
    const int column = head % GROUP_HEADS * GROUP_COLUMNS;
    const size_t entry = ((size_t)batch * n_groups + group) * n_splits;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // The decoder and the mean do not depend on anything: they are asked for first. Component k of this thread's is
    // part + PARTS k.
    const int part = threadIdx.x / HEAD_DIM % PARTS, dim = threadIdx.x % HEAD_DIM;
    u16 d[ROWS];
    {
        const u16* own = decoder + (size_t)(head * COMPONENTS) * HEAD_DIM + dim;
#pragma unroll
        for (int k = 0; k < ROWS; k++)
            d[k] = part + PARTS * k < COMPONENTS ? own[(part + PARTS * k) * HEAD_DIM] : (u16)0;
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
            const bool there = i < COMPONENTS * GROUP_COLUMNS && split < n_splits;
            ahead[item][split] =
                there ? sums[((entry + split) * COMPONENTS + i / GROUP_COLUMNS) * 8 + column + i % GROUP_COLUMNS]
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
            sum_exact += exp_2(own.x - top) * own.y;
        }
        float all = top;
#pragma unroll
        for (int step = 16; step; step /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, step));
        raise(all);
        for (int i = lane; i < n_splits; i += 32)
            scale[i * GROUP_COLUMNS + g] = exp_2(scale[i * GROUP_COLUMNS + g] - top);
        for (int i = lane; i < n_exact; i += 32)
            exact_scale[i * GROUP_COLUMNS + g] = exp_2(exact_scale[i * GROUP_COLUMNS + g] - top);
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
        if (i >= COMPONENTS * GROUP_COLUMNS) break;
        const int g = i % GROUP_COLUMNS, component = i / GROUP_COLUMNS;
        const float* from = sums + (entry * COMPONENTS + component) * 8 + column + g;
        float sum = 0.0f;
#pragma unroll
        for (int split = 0; split < AHEAD; split++)
            if (split < n_splits) sum += scale[split * GROUP_COLUMNS + g] * ahead[item][split];
#pragma unroll(2 * AHEAD)
        for (int split = AHEAD; split < n_splits; split++)
            sum += scale[split * GROUP_COLUMNS + g] * from[(size_t)split * (COMPONENTS * 8)];
        z[i] = sum * place_of(component) - offset_of(component / 32, VF, VN, VP) * all_weighted[g];
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
            if (part + PARTS * k < COMPONENTS)
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
