// ------------------------------------------------------------------------------------------------------------ prepare

#define ROUNDER 12582912.0f      // 1.5 * 2^23: the low bytes of a number beside it are those of an integer
#define ROUNDER_BITS 0x4b400000u

// Bytes 0 (or 1) of four integers.
__device__ __forceinline__ u32 four_bytes(const u32 (&x)[4], bool second) {
    const u32 pick = second ? 0x51 : 0x40;
    return __byte_perm(__byte_perm(x[0], x[1], pick), __byte_perm(x[2], x[3], pick), 0x5410);
}

// The high and the low bytes of four numbers as 16-bit fixed-point ones; returns the sum of these.
__device__ __forceinline__ int round_four(u32& high, u32& low, const float (&x)[4], float inverse) {
    u32 fixed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) fixed[i] = __float_as_uint(x[i] * inverse + ROUNDER);
    high = four_bytes(fixed, true);
    low = four_bytes(fixed, false);
    return (int)(fixed[0] + fixed[1] + fixed[2] + (fixed[3] - 4u * ROUNDER_BITS));
}

// One thread block: the queries of one KV head, turned back for TURN_ROWS turns in each warp. decoder: of all
// heads, as the second factor of products: [KV heads, KEY_SETS, 4 tiles, STEPS, 32 lanes] of 8 float16 numbers;
// halves of sets pass through `memory`, RING of them at a time.
__device__ __forceinline__ void absorb(
    int task, const u16* query, const uint4* decoder, const float* key_mean, const float2* angles, u32* absorbed,
    float4* biases, int n_turns, int n_kv_heads, int q_batch, int q_head, int angle_batch, float scale, uint4* memory,
    const float* largest_rows
) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int parts = (n_turns + TURN_ROWS * PREPARE_WARPS - 1) / (TURN_ROWS * PREPARE_WARPS);
    const int head = task / parts % n_kv_heads, batch = task / parts / n_kv_heads;
    const int pass = pass_of(head), n_passes = n_kv_heads / GROUP_HEADS * PASSES;
    decoder += head * (CHUNKS * CHUNK_SIZE);
    const float largest_row = largest_rows[head];
    u32 to = shared_address(memory) + 16 * threadIdx.x;
    const char* source = (const char*)decoder + 16 * threadIdx.x;
    pin(to, source);
    auto fetch = [&](int chunk) {
        const int pieces = chunk < CHUNKS ? CHUNK_SIZE - threadIdx.x : 0;
#pragma unroll
        for (int i = 0; i < CHUNK_SIZE; i += 32 * PREPARE_WARPS)
            if (i < pieces) copy_16(to + chunk % RING * (16 * CHUNK_SIZE) + 16 * i, source + 16 * i);
        source += 16 * CHUNK_SIZE;
        commit();
    };
#pragma unroll
    for (int chunk = 0; chunk < RING - 1; chunk++) fetch(chunk);
    u32 q[2 * STEPS][4];
    int place[2], entry[2];
    bool wanted[2];
    int bias[2] = {0, 0};       // in halves of a fixed-point number's unit
    float mean[2], inverse[2];  // of that unit
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = r + 8 * half, own = row % PADDED_COLUMNS;
        const int turn = (task % parts * PREPARE_WARPS + threadIdx.x / 32) * TURN_ROWS + row / PADDED_COLUMNS;
        wanted[half] = turn < n_turns && own < GROUP_COLUMNS;
        const int column = column_of(head) + own, first = (batch * n_turns + turn) * n_passes + pass;
        entry[half] = first * 8 + column;
        place[half] = (first * KEY_SETS * 32 + column * 4 + c) * 4;
        const int dim = c * (HEAD_DIM / 8);
        mean[half] = turn_back(
            q, half, wanted[half], query + (size_t)batch * q_batch + (head * GROUP_COLUMNS + own) * q_head + dim,
            angles + (size_t)batch * angle_batch + (size_t)turn * (HEAD_DIM / 2) + dim, key_mean + head * HEAD_DIM + dim
        );
        // No product of a row and a query is larger than that of their norms.
        float squares = 0.0f;
#pragma unroll
        for (int step = 0; step < 2 * STEPS; step++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 two = q[step][2 * (k / 2) + half];
                const float x = from_half(k % 2 ? two >> 16 : two & 0xffff);
                squares += x * x;
            }
        inverse[half] = QUERY_ONE / fmaxf(sqrtf(row_sum(squares)) * largest_row * 1.001f, 1e-20f);
    }
#pragma unroll 1
    for (int set = 0; set < KEY_SETS; set++) {
        const int offset = (int)(2.0f * offset_of(set, KF, KN, KP));
        u32 stored[2][4];  // of both rows, eight components
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const int chunk = 2 * set + part;
            wait<RING - 2>();
            __syncthreads();
            fetch(chunk + RING - 1);  // where the chunk before this one lay
            Chunk its_decoder;
            load_chunk(its_decoder, memory + chunk % RING * CHUNK_SIZE + lane);
            float x[2][4];
            absorb_chunk(x, q, its_decoder);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32(&own)[4] = stored[half];
                if (set < KF) {
                    const uint2 four = stored_four(x[half], scale * QUERY_SCALE);
                    own[2 * part] = four.x, own[2 * part + 1] = four.y;
                } else {
                    bias[half] += offset * round_four(own[part], own[2 + part], x[half], inverse[half]);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (wanted[half])
                *(uint4*)(absorbed + place[half] + 128 * set) =
                    make_uint4(stored[half][0], stored[half][1], stored[half][2], stored[half][3]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float of_mean = row_sum(mean[half]) * scale, unit = scale / inverse[half];
        const float of_offsets = row_sum((float)bias[half]) * 0.5f * unit;
        if (wanted[half] && c == 0) biases[entry[half]] = make_float4(unit, of_offsets, of_mean, 0.0f);
    }
}

// Thread blocks: first those of `attend_exact`, a warp for EXACT_TOKENS tokens of a (sequence, KV head); then those of
// `absorb`. query: [batch, heads, 1, HEAD_DIM]; decoder: see absorb; angles: [1 or batch, n_turns, HEAD_DIM / 2], cos
// and sin; largest_rows: [KV heads], the norm of the longest of a head's decoder's rows that codes are multiplied by;
// absorbed: [batch, n_turns, passes, KEY_SETS, 32 lanes], for numbers eight float16 numbers, times QUERY_SCALE, for codes
// eight fixed-point ones, high bytes before low ones; biases: [batch, n_turns, passes, 8]: the unit of fixed-point
// numbers, what offsets and what the mean add to a score.
extern "C" __global__ void __launch_bounds__(32 * PREPARE_WARPS, HEAD_DIM > 128 ? 2 : 4) prepare(
    const u16* query, const uint4* decoder, const float* key_mean, const float2* angles, const float* largest_rows,
    const int* last, u32* absorbed, float4* biases, EXACT_TENSORS, int n_batch, int n_turns, int n_kv_heads,
    int turn_shift, int angle_batch, EXACT_SIZES, double scaling
    PAGED(, const int* rows, const int* lengths, const int* exact_pages, const int* sinks, int exact_pages_row)
) {
    DYNAMIC_SHARED(uint4, chunks);
    let_next_begin();
    const float scale = (float)scaling;
    const int n_tasks = n_batch * n_kv_heads * EXACT_PARTS(n_sinks + n_recent);
    const int n_exact = (n_tasks + PREPARE_WARPS - 1) / PREPARE_WARPS, block = blockIdx.x;
    if (block < n_exact) {
        const Exact exact = EXACT(PAGED({rows, lengths, last}, exact_pages, sinks, exact_pages_row));
        const int task = block * PREPARE_WARPS + threadIdx.x / 32;
        if (task < n_tasks) attend_exact(exact, task, query, n_kv_heads, q_batch, q_head, scale);
        return;
    }
    // Turns that begin beyond what counts of a sequence are never scored.
    const int parts = (n_turns + TURN_ROWS * PREPARE_WARPS - 1) / (TURN_ROWS * PREPARE_WARPS), task = block - n_exact;
    if ((task % parts * (TURN_ROWS * PREPARE_WARPS) << turn_shift) * 128 >= last[task / parts / n_kv_heads]) return;
    absorb(
        task, query, decoder, key_mean, angles, absorbed, biases, n_turns, n_kv_heads, q_batch, q_head, angle_batch,
        scale, chunks, largest_rows
    );
}
