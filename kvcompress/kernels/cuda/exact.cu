// -------------------------------------------------------------------------------------------------------------- exact

#define EXACT_PARTS(TOKENS) (((TOKENS) + EXACT_TOKENS - 1) / EXACT_TOKENS)
#define STEPS (HEAD_DIM / 32)          // pieces of 8 dimensions of a lane c
#define PIECES ((HEAD_DIM + 63) / 64)  // of a lane r

// The sinks and recent tokens beside the packed ones. mask: [batch, sinks + recent], or null. sums: [batch, KV heads,
// parts, GROUP_COLUMNS, HEAD_DIM]; stats: [batch, KV heads, parts, GROUP_COLUMNS], largest score and sum of weights.
// In pages: n_recent is the most, k_batch and v_batch lead from page to page, s_batch from one sequence's sinks to the
// next; pages: [rows, pages_row], of tokens 0, EXACT_PAGE, ...; sinks: whose of each row.
struct Exact {
    const u16 *sink_keys, *sink_values, *keys, *values;
    const u8* mask;
    float* sums;
    float2* stats;
    int n_sinks, n_recent, s_batch, s_head, s_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
    PAGED(Seen seen; const int *pages, *sinks; int pages_row;)
};

// The parameters of a launch that Exact is made of, its tensors and its sizes (turned.py), and how it is made of them.
#define EXACT_TENSORS                                                                                     \
    const u16 *sink_keys, const u16 *sink_values, const u16 *keys, const u16 *values, const u8 *exact_mask, \
        float *exact_sums, float2 *exact_stats
#define EXACT_SIZES                                                                                               \
    int n_sinks, int n_recent, int has_exact_mask, int q_batch, int q_head, int s_batch, int s_head, int s_token, \
        int k_batch, int k_head, int k_token, int v_batch, int v_head, int v_token
#define EXACT(...)                                                                                                  \
    {sink_keys, sink_values, keys,    values,  has_exact_mask ? exact_mask : 0,                                     \
     exact_sums, exact_stats, n_sinks, n_recent, s_batch,                                                           \
     s_head,    s_token,     k_batch, k_head,  k_token,                                                             \
     v_batch,   v_head,      v_token, __VA_ARGS__}

// How many exact tokens a query token of a batch in pages sees: the sinks are among the others until any is packed.
__device__ __forceinline__ int exact_tokens(const Seen& seen, int batch, int n_sinks) {
    const int packed = seen.encoded[batch];
    return seen.lengths[batch] - packed + (packed > 0 ? n_sinks : 0);
}

// Two stored numbers in a word.
__device__ __forceinline__ u32 stored_2(float low, float high) {
    return QUERY_BF16 ? to_bfloat16(low) | (u32)to_bfloat16(high) << 16 : to_half2(low, high);
}

// What storing a number leaves out.
__device__ __forceinline__ float rest_of(float x) { return x - number(stored(x)); }

// One warp: EXACT_TOKENS tokens of one KV head, all of which are asked for at once. task: of (sequence, KV head, part).
__device__ __forceinline__ void attend_exact(
    const Exact& exact, int task, const u16* query, int n_kv_heads, int q_batch, int q_head, float scale
) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int most = exact.n_sinks + exact.n_recent, parts = EXACT_PARTS(most), first = task % parts * EXACT_TOKENS;
    const int head = task / parts % n_kv_heads, batch = task / parts / n_kv_heads;
#if PAGE_BLOCKS
    const int n = exact_tokens(exact.seen, batch, exact.n_sinks), packed = exact.seen.encoded[batch];
    if (first >= n) return;  // nor will `combine` read this part
    const int n_sinks = packed > 0 ? exact.n_sinks : 0, row = exact.seen.rows[batch];
    const int* pages = exact.pages + (size_t)row * exact.pages_row;
    const int sinks_of = n_sinks ? exact.sinks[row] : 0;
#else
    const int n = most, n_sinks = exact.n_sinks, sinks_of = batch;
#endif
    // Where a token after the sinks begins: all that differs between pages and sequences.
    auto place = [&](const u16* from, int token, size_t s_page, int s_token) {
#if PAGE_BLOCKS
        token += packed;
        return from + pages[token / EXACT_PAGE] * s_page + token % EXACT_PAGE * s_token;
#else
        return from + batch * s_page + token * s_token;
#endif
    };
    const u16* sink_keys = exact.sink_keys + (size_t)sinks_of * exact.s_batch + head * exact.s_head;
    const u16* sink_values = exact.sink_values + (size_t)sinks_of * exact.s_batch + head * exact.s_head;
    const u16 *keys = exact.keys + head * exact.k_head, *values = exact.values + head * exact.v_head;
    // After the last token, it is there again: to be multiplied with weights of 0.
    auto key = [&](int i) {
        const int token = min(first + i, n - 1);
        return token < n_sinks ? sink_keys + token * exact.s_token
                               : place(keys, token - n_sinks, exact.k_batch, exact.k_token);
    };
    auto value = [&](int i) {
        const int token = min(first + i, n - 1);
        return token < n_sinks ? sink_values + token * exact.s_token
                               : place(values, token - n_sinks, exact.v_batch, exact.v_token);
    };
    query += (size_t)batch * q_batch + (head * GROUP_COLUMNS + min(r, GROUP_COLUMNS - 1)) * q_head;
    // Dimensions of keys and queries in the order in which they lie: products do not mind one that both have.
    uint4 k[2][STEPS], q[STEPS], v[4][PIECES];
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        q[i] = *(const uint4*)(query + 8 * c + 32 * i);
#pragma unroll
        for (int half = 0; half < 2; half++) k[half][i] = *(const uint4*)(key(r + 8 * half) + 8 * c + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            v[i][piece] = HEAD_DIM % 64 == 0 || 64 * piece + 8 * r < HEAD_DIM
                              ? *(const uint4*)(value(2 * c + i % 2 + 8 * (i / 2)) + 64 * piece + 8 * r)
                              : make_uint4(0, 0, 0, 0);
    bool seen[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int token = first + r + 8 * half;
        seen[half] = token < n && (!exact.mask || exact.mask[(size_t)batch * n + token]);
    }

    float p[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of token r + 8 half and column 2 c + k in [2 half + k]
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        mma_stored(p, k[0][i].x, k[1][i].x, k[0][i].y, k[1][i].y, q[i].x, q[i].y);
        mma_stored(p, k[0][i].z, k[1][i].z, k[0][i].w, k[1][i].w, q[i].z, q[i].w);
    }
    float top[2], total[2];
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = seen[i / 2] ? p[i] * scale : NEVER;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        top[i] = fmaxf(p[i], p[2 + i]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], step));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = seen[i / 2] ? exp_2(p[i] - top[i % 2]) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] = p[i] + p[2 + i];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], step);
        if (r == 0 && 2 * c + i < GROUP_COLUMNS)
            exact.stats[task * GROUP_COLUMNS + 2 * c + i] = make_float2(top[i], total[i]);
    }
    // Rows of the product of weights and values: what can be stored of a weight, and eight rows further, the rest.
    const u32 a0 = transposed(stored_2(p[0], p[1])), a1 = transposed(stored_2(rest_of(p[0]), rest_of(p[1])));
    const u32 a2 = transposed(stored_2(p[2], p[3])), a3 = transposed(stored_2(rest_of(p[2]), rest_of(p[3])));
    float* sums = exact.sums + ((size_t)task * GROUP_COLUMNS + r) * HEAD_DIM;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float sum[2][8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 b[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 &x = v[2 * half][piece], &y = v[2 * half + 1][piece];
                const u32 low = i / 2 == 0 ? x.x : i / 2 == 1 ? x.y : i / 2 == 2 ? x.z : x.w;
                const u32 high = i / 2 == 0 ? y.x : i / 2 == 1 ? y.y : i / 2 == 2 ? y.z : y.w;
                b[half] = __byte_perm(low, high, i % 2 ? 0x7632 : 0x5410);
            }
            float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma_stored(d, a0, a1, a2, a3, b[0], b[1]);
            sum[0][i] = d[0] + d[2];
            sum[1][i] = d[1] + d[3];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int dim = 64 * piece + 16 * c + 8 * i;
            if (r >= GROUP_COLUMNS || dim >= HEAD_DIM) continue;
            *(float4*)(sums + dim) = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
            *(float4*)(sums + dim + 4) = make_float4(sum[i][4], sum[i][5], sum[i][6], sum[i][7]);
        }
    }
}
