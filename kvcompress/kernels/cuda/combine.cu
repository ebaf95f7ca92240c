// ------------------------------------------------------------------------------------------------------------ combine

#define PAIRS (HEAD_DIM / 2)  // of dimensions: a thread has one
#define PARTS (COMBINE_THREADS / PAIRS)
#define COMPONENTS (32 * VALUE_SETS)
#define ROWS ((COMPONENTS + PARTS - 1) / PARTS)
#define ITEMS ((COMPONENTS * GROUP_COLUMNS + COMBINE_THREADS - 1) / COMBINE_THREADS)  // of a thread
#define AHEAD (ITEMS < 4 ? 4 / ITEMS : 1)   // splits whose sums a thread asks for before it knows how much they count
#define ROWS_AHEAD (ROWS < 16 ? ROWS : 16)  // of the decoder, asked for before anything

// What place a code has in its byte, the other way round.
__device__ __forceinline__ float place_of(int component) {
    const int set = component / 32, place = component % 4;
    const int bits = set < VF ? 0 : set < VF + VN ? 4 * (place % 2) : set < VF + VN + VP ? 2 * place : place;
    return __uint_as_float((127 - bits) << 23);
}

// Grid: (KV heads, batch). decoder: [KV heads, COMPONENTS, HEAD_DIM], rows of components that are not there 0. out:
// [batch, 1, heads, HEAD_DIM]. exact_sums, exact_stats: see Exact. Shared: GROUP_COLUMNS * (splits + exact parts +
// COMPONENTS + PARTS * HEAD_DIM) floats, of the most splits and parts.
// In pages: n_splits: of all query tokens, of which each has those from starts[batch] to starts[batch + 1]; n_exact: the
// most parts.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine(
    const float* stats, const float* sums, const float* exact_sums, const float2* exact_stats, const u16* decoder,
    const float* mean, u16* out, int n_splits, int n_exact, int out_batch, int out_head, int has_mean
    PAGED(, const int* starts, const int* lengths, const int* encoded, int n_sinks)
) {
    DYNAMIC_SHARED(float, memory);
    const int head = blockIdx.x, batch = blockIdx.y, n_kv_heads = gridDim.x;
    const int pass = pass_of(head), n_passes = n_kv_heads / GROUP_HEADS * PASSES;
    const int most_exact = n_exact;
#if PAGE_BLOCKS
    const size_t entry = (size_t)pass * n_splits + starts[batch];
    n_splits = starts[batch + 1] - starts[batch];
    n_exact = EXACT_PARTS(exact_tokens({0, lengths, encoded}, batch, n_sinks));
#else
    const size_t entry = ((size_t)batch * n_passes + pass) * n_splits;
#endif
    float* partial = memory;                                // [PARTS, GROUP_COLUMNS, HEAD_DIM]
    float* z = partial + PARTS * GROUP_COLUMNS * HEAD_DIM;  // [COMPONENTS, GROUP_COLUMNS]
    float* scale = z + COMPONENTS * GROUP_COLUMNS;          // [splits, GROUP_COLUMNS]
    float* exact_scale = scale + n_splits * GROUP_COLUMNS;  // [exact parts, GROUP_COLUMNS]
    __shared__ float all_total[GROUP_COLUMNS], all_weighted[GROUP_COLUMNS], packed_total[GROUP_COLUMNS];
    const int column = column_of(head);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // The decoder and the mean do not depend on anything: they are asked for first. Component k of this thread's is
    // part + PARTS k.
    const int part = threadIdx.x / PAIRS % PARTS, dim = 2 * (threadIdx.x % PAIRS);  // and the next
    decoder += (size_t)(head * COMPONENTS + part) * HEAD_DIM + dim;
    u32 d[ROWS_AHEAD];
#pragma unroll
    for (int k = 0; k < ROWS_AHEAD; k++)
        d[k] = part + PARTS * k < COMPONENTS ? *(const u32*)(decoder + PARTS * k * HEAD_DIM) : 0;
    const float2 own_mean =
        has_mean && part == 0 ? *(const float2*)(mean + head * HEAD_DIM + dim) : make_float2(0.0f, 0.0f);
    await_previous();
    // The rest before it is known how much it counts: exact parts lie where what is added to them will, sums of the
    // first splits are kept.
    exact_sums += (size_t)(batch * n_kv_heads + head) * most_exact * (GROUP_COLUMNS * HEAD_DIM);
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
        const float2* exact = exact_stats + (batch * n_kv_heads + head) * most_exact * GROUP_COLUMNS + g;
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
    if (threadIdx.x < PARTS * PAIRS) {
        float2 value[GROUP_COLUMNS];
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++)
            value[g] = make_float2(packed_total[g] * own_mean.x, packed_total[g] * own_mean.y);
        auto add = [&](int g, float weight, float2 x) { value[g].x += weight * x.x, value[g].y += weight * x.y; };
        for (int k = part; k < n_exact; k += PARTS)
#pragma unroll
            for (int g = 0; g < GROUP_COLUMNS; g++) {
                const int row = k * GROUP_COLUMNS + g;
                add(g, exact_scale[row], *(const float2*)((k == part ? partial : exact_sums) + row * HEAD_DIM + dim));
            }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (part + PARTS * k >= COMPONENTS) break;
            const u32 two = k < ROWS_AHEAD ? d[k < ROWS_AHEAD ? k : 0] : *(const u32*)(decoder + PARTS * k * HEAD_DIM);
            const float2 x = make_float2(from_half(two & 0xffff), from_half(two >> 16));
#pragma unroll
            for (int g = 0; g < GROUP_COLUMNS; g++) add(g, z[(part + PARTS * k) * GROUP_COLUMNS + g], x);
        }
#pragma unroll
        for (int g = 0; g < GROUP_COLUMNS; g++)
            *(float2*)(partial + (part * GROUP_COLUMNS + g) * HEAD_DIM + dim) = value[g];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HEAD_DIM * GROUP_COLUMNS; i += COMBINE_THREADS) {
        const int g = i / HEAD_DIM;
        float value = 0.0f;
#pragma unroll
        for (int k = 0; k < PARTS; k++) value += partial[k * GROUP_COLUMNS * HEAD_DIM + i];
        const float total = all_total[g];
        out[(size_t)batch * out_batch + (head * GROUP_COLUMNS + g) * out_head + i % HEAD_DIM] =
            stored(total > 0.0f ? value / total : 0.0f);
    }
}
