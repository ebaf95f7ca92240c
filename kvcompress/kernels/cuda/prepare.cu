// ------------------------------------------------------------------------------------------------------------ prepare

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
    const int pass = pass_of(head), n_passes = n_kv_heads / GROUP_HEADS * PASSES;
    decoder += head * (CHUNKS * CHUNK_SIZE);
    const float to_stored = scale * QUERY_SCALE;
    u32 to = shared_address(memory) + 16 * threadIdx.x;
    const char* source = (const char*)decoder + 16 * threadIdx.x;
    pin(to, source);
    auto fetch = [&](int chunk) {
        const int pieces = chunk < CHUNKS ? CHUNK_SIZE / 2 - threadIdx.x : 0;
#pragma unroll
        for (int i = 0; i < CHUNK_SIZE / 2; i += 32 * PREPARE_WARPS)
            if (i < pieces) copy_16(to + chunk % RING * (8 * CHUNK_SIZE) + 16 * i, source + 16 * i);
        source += 8 * CHUNK_SIZE;
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
        const int column = column_of(head) + own;
        entry[half] = ((batch * n_turns + turn) * n_passes + pass) * 8 + column;
        place[half] = (((batch * n_turns + turn) * n_passes + pass) * KEY_SETS * 32 + column * 4 + c) * 4;
        const int dim = c * (HEAD_DIM / 8);
        mean[half] = turn_back(
            q, half, wanted[half], query + (size_t)batch * q_batch + (head * GROUP_COLUMNS + own) * q_head + dim,
            angles + (size_t)batch * angle_batch + (size_t)turn * (HEAD_DIM / 2) + dim, key_mean + head * HEAD_DIM + dim
        );
    }
#pragma unroll 1
    for (int set = 0; set < KEY_SETS; set++) {
        const float offset = offset_of(set, KF, KN, KP);
        u32 numbers[2][4];  // of both rows, eight components
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const int chunk = 2 * set + part;
            wait<RING - 2>();
            __syncthreads();
            fetch(chunk + RING - 1);  // where the chunk before this one lay
            Chunk own;
            load_chunk(own, memory + chunk % RING * CHUNK_SIZE + lane);
            float x[2][4];
            absorb_chunk(x, q, own, to_stored);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                bias[half] += offset * (x[half][0] + x[half][1] + x[half][2] + x[half][3]);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (set >= KF) largest[half] = fmaxf(largest[half], fabsf(x[half][i]));
                numbers[half][2 * part] = to_half2(x[half][0], x[half][1]);
                numbers[half][2 * part + 1] = to_half2(x[half][2], x[half][3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (wanted[half])
                *(uint4*)(absorbed + place[half] + 128 * set) =
                    make_uint4(numbers[half][0], numbers[half][1], numbers[half][2], numbers[half][3]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bias[half] = row_sum(bias[half]);
        mean[half] = row_sum(mean[half]);
#pragma unroll
        for (int step = 1; step < 4; step *= 2)
            largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], step));
        // a little more than the largest, which float16 numbers may have been rounded up from
        const float unit = largest[half] * 1.001f / QUERY_ONE;
        if (wanted[half] && c == 0)
            biases[entry[half]] = make_float4(
                unit / QUERY_SCALE, bias[half] / QUERY_SCALE, mean[half] * scale, unit > 0.0f ? 1.0f / unit : 0.0f
            );
    }
}

// Thread blocks: first those of `attend_exact`, a warp for EXACT_TOKENS tokens of a (sequence, KV head); then those of
// `absorb`. query: [batch, heads, 1, HEAD_DIM]; decoder: see absorb; angles: [1 or batch, n_turns, HEAD_DIM / 2], cos
// and sin; absorbed: [batch, n_turns, passes, KEY_SETS, 32 lanes], eight float16 numbers, times QUERY_SCALE; biases:
// [batch, n_turns, passes, 8]: the unit of these numbers as fixed-point ones, what offsets and what the mean add to a
// score, and what the float16 numbers are multiplied by to become fixed-point ones.
extern "C" __global__ void __launch_bounds__(32 * PREPARE_WARPS) prepare(
    const u16* query, const uint2* decoder, const float* key_mean, const float2* angles, const int* last, u32* absorbed,
    float4* biases, const u16* sink_keys, const u16* sink_values, const u16* keys, const u16* values,
    const u8* exact_mask, float* exact_sums, float2* exact_stats, int n_batch, int n_turns, int n_kv_heads,
    int turn_shift, int angle_batch, int n_sinks, int n_recent, int has_exact_mask, int q_batch, int q_head,
    int s_batch, int s_head, int s_token, int k_batch, int k_head, int k_token, int v_batch, int v_head, int v_token,
    double scaling
    PAGED(, const int* rows, const int* lengths, const int* exact_pages, const int* sinks, int exact_pages_row)
) {
    DYNAMIC_SHARED(uint2, chunks);
    let_next_begin();
    const float scale = (float)scaling;
    const int n_tasks = n_batch * n_kv_heads * EXACT_PARTS(n_sinks + n_recent);
    const int n_exact = (n_tasks + PREPARE_WARPS - 1) / PREPARE_WARPS, block = blockIdx.x;
    if (block < n_exact) {
        const Exact exact = {
            sink_keys,  sink_values, keys,    values,   has_exact_mask ? exact_mask : 0,
            exact_sums, exact_stats, n_sinks, n_recent, s_batch,
            s_head,     s_token,     k_batch, k_head,   k_token,
            v_batch,    v_head,      v_token,
            PAGED({rows, lengths, last}, exact_pages, sinks, exact_pages_row)
        };
        const int task = block * PREPARE_WARPS + threadIdx.x / 32;
        if (task < n_tasks) attend_exact(exact, task, query, n_kv_heads, q_batch, q_head, scale);
        return;
    }
    // Turns that begin beyond what counts of a sequence are never scored.
    const int parts = (n_turns + TURN_ROWS * PREPARE_WARPS - 1) / (TURN_ROWS * PREPARE_WARPS), task = block - n_exact;
    if ((task % parts * (TURN_ROWS * PREPARE_WARPS) << turn_shift) * 128 >= last[task / parts / n_kv_heads]) return;
    absorb(
        task, query, decoder, key_mean, angles, absorbed, biases, n_turns, n_kv_heads, q_batch, q_head, angle_batch,
        scale, chunks
    );
}
