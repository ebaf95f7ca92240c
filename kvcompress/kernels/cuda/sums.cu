// --------------------------------------------------------------------------------------------------------------- sums

// Where a lane's float16 numbers begin in those of a block.
__device__ __forceinline__ const u32* number_keys(const u32* block, int r, int c) {
    return block + 32 * c + 4 * ((r + 2 * c) & 7);
}

__device__ __forceinline__ const u32* number_values(const u32* block, int r, int c) { return block + 64 * r + 4 * c; }

// Scores of a block by its class F, times QUERY_SCALE: of token 16 t + 8 h + r and column 2 c + k in [t][2 h + k].
// queries: of this lane, 32 apart from set to set.
__device__ __forceinline__ void score_numbers(
    float (&scores)[2][4], const u32* from, const Group& group, const uint4* queries, int c
) {
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[t][i] = 0.0f;
#pragma unroll
    for (int set = 0; set < KF; set++) {
        const uint4 q = queries[32 * set];
#pragma unroll
        for (int step = 0; step < 2; step++) {
            // Lane c takes the pairs of components c and c + 4 of each half of the set.
            const int pair = 16 * set + 8 * step;
            uint4 x = make_uint4(0, 0, 0, 0), y = x;  // what follows the last pair might be no number
            if (!KEY_HOLES || 2 * (pair + c) < group.numbers) x = *(const uint4*)(from + 32 * pair);
            if (!KEY_HOLES || 2 * (pair + 4 + c) < group.numbers) y = *(const uint4*)(from + 32 * (pair + 4));
            const u32 b0 = step ? q.z : q.x, b1 = step ? q.w : q.y;
            mma(scores[0], x.x, x.y, y.x, y.y, b0, b1);
            mma(scores[1], x.z, x.w, y.z, y.w, b0, b1);
        }
    }
}

// Adds a set of class F over the tokens of a block: of component 4 r + 2 j + h and column 2 c + k into [j][2 h + k].
// weights: two tokens a word, those that lane c takes of each half t, of column r.
__device__ __forceinline__ void sum_numbers(
    float (&sums)[2][4], const u32 (&weights)[2][2], const u32* from, const Group& group, int set, int r
) {
    const bool there = !VALUE_HOLES || 4 * (8 * set + r) < group.numbers;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int t = 0; t < 2; t++) {
            uint4 x = make_uint4(0, 0, 0, 0);  // what follows the last quad might be no number
            if (there) x = *(const uint4*)(from + 512 * set + 32 * j + 16 * (t ^ (r & 1)));
            mma(sums[j], x.x, x.y, x.z, x.w, weights[t][0], weights[t][1]);
        }
}

// Scores of a block's tokens that do not count, from token `first` on: of token 16 t + 8 h + r in [t][2 h + k].
__device__ __forceinline__ void hide_unseen(float (&s)[2][4], const u8* mask, int first, int lo, int hi, int r) {
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int token = first + 16 * t + 8 * h + r;
            bool seen = token >= lo && token < hi;
            if (HAS_MASK) seen = seen && mask[token] != 0;
            if (!seen) s[t][2 * h] = s[t][2 * h + 1] = NEVER;
        }
}

// What a warp has seen of its columns 2 c and 2 c + 1: the largest score, the sum of weights, that of weights times
// gains (all lanes c of a column hold it), value sums as of sum_numbers. total: of this lane's rows only.
struct State {
    float top[2], total[2], weighted[2], sums[VALUE_SETS][2][4];
};

__device__ __forceinline__ void begin_sums(State& state) {
#pragma unroll
    for (int k = 0; k < 2; k++) state.top[k] = NEVER, state.total[k] = state.weighted[k] = 0.0f;
#pragma unroll
    for (int set = 0; set < VALUE_SETS; set++)
#pragma unroll
        for (int i = 0; i < 8; i++) state.sums[set][i / 4][i % 4] = 0.0f;
}

// Older sums, brought to a new largest score.
__device__ __forceinline__ void shrink_sums(State& state, const float (&shrink)[2]) {
    if (!__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int k = 0; k < 2; k++) state.total[k] *= shrink[k], state.weighted[k] *= shrink[k];
#pragma unroll
    for (int set = 0; set < VALUE_SETS; set++)
#pragma unroll
        for (int i = 0; i < 8; i++) state.sums[set][i / 4][i % 4] *= shrink[i % 2];
}

// The warps' sums, brought to one scale, times `unit`, and added up. own, memory: shared, the latter of WARPS * 128
// VALUE_SETS pairs, where nobody may still read. stats: [3, 8] of the split, largest score, sum of weights, sum of
// weights times gains; sums: [32 VALUE_SETS, 4] pairs of columns.
__device__ __forceinline__ void add_up(
    State& state, float unit, float (&own)[WARPS][3][8], float2* memory, float* stats, float2* sums
) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4, r = lane / 4;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) state.total[k] += __shfl_xor_sync(0xffffffffu, state.total[k], step);
        if (r == 0) {
            own[warp][0][2 * c + k] = state.top[k];
            own[warp][1][2 * c + k] = state.total[k];
            own[warp][2][2 * c + k] = state.weighted[k];
        }
    }
    __syncthreads();
    float shrink[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float all = NEVER;
#pragma unroll
        for (int w = 0; w < WARPS; w++) all = fmaxf(all, own[w][0][2 * c + k]);
        shrink[k] = exp_2(state.top[k] - all) * unit;
    }
#pragma unroll
    for (int set = 0; set < VALUE_SETS; set++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float (&four)[4] = state.sums[set][i / 2];
            const int h = 2 * (i % 2);
            memory[warp * (128 * VALUE_SETS) + (32 * set + 4 * r + i) * 4 + c] =
                make_float2(four[h] * shrink[0], four[h + 1] * shrink[1]);
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 128 * VALUE_SETS; i += 32 * WARPS) {
        float2 all = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 x = memory[w * (128 * VALUE_SETS) + i];
            all.x += x.x, all.y += x.y;
        }
        sums[i] = all;
    }
    if (threadIdx.x < 8) {
        float all = NEVER, sum = 0.0f, sum_weighted = 0.0f;
        for (int w = 0; w < WARPS; w++) all = fmaxf(all, own[w][0][threadIdx.x]);
        for (int w = 0; w < WARPS; w++) {
            const float e = exp_2(own[w][0][threadIdx.x] - all);
            sum += e * own[w][1][threadIdx.x];
            sum_weighted += e * own[w][2][threadIdx.x];
        }
        stats[threadIdx.x] = all;
        stats[8 + threadIdx.x] = sum;
        stats[16 + threadIdx.x] = sum_weighted;
    }
}
