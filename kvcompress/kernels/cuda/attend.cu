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

// What is the same for all units of a warp. key_words, value_words: of the sequence, or of the first of all pages, from
// the group's first word on; pages: of the sequence, page_words apart from each other; n_blocks: those that there are.
// memory: the warp's. A turn has 2^turn_shift units.
struct Site {
    const u32 *key_words, *value_words;
    PAGED(const int* pages; int page_words;)
    const uint4* absorbed;
    const float4* biases;
    int key_row, value_row, key_pieces, value_pieces, key_gain_word, value_gain_word, n_blocks, turn_shift, turn_stride;
    u32* memory;
};

// The page of a unit, or 0 without pages: to be asked for before it is needed.
__device__ __forceinline__ int page_of(const Site& site, int unit) {
#if PAGE_BLOCKS
    return site.pages[unit / (PAGE_BLOCKS / BLOCKS)];
#else
    return 0;
#endif
}

// Where the rows of a unit begin.
struct Rows {
    const u32 *keys, *values;
};

__device__ __forceinline__ Rows rows_of(const Site& site, int unit, int page) {
#if PAGE_BLOCKS
    const size_t first = (size_t)page * site.page_words;
    const int block = unit % (PAGE_BLOCKS / BLOCKS) * BLOCKS;
    return {site.key_words + first + block * site.key_row, site.value_words + first + block * site.value_row};
#else
    const size_t block = unit * BLOCKS;
    return {site.key_words + block * site.key_row, site.value_words + block * site.value_row};
#endif
}

// The group's words of a unit's blocks, of which n_blocks are there; one without all of them repeats the last. words:
// of the first of its rows. MOST, pieces: of 16 bytes.
template <int MOST>
__device__ __forceinline__ void stage(u32* to, const u32* words, int row, int pieces, int n_blocks, int lane) {
    u32 place = shared_address(to) + 16 * lane;
    const char* from = (const char*)words + 16 * lane;
    const u64 policy = first_to_go();
    pin(place, from);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < MOST; i += 32)
            if (i + lane < pieces) copy_16_once(place + 16 * (b * MOST + i), from + 16 * i, policy);
        if (b + 1 < n_blocks) from += 4 * row;
    }
}

// Keys of a unit, and the gains of keys and values, these into the half of their place that `phase` says.
__device__ __forceinline__ void stage_keys(const Site& site, const Rows& rows, int unit, int phase, int lane) {
    const int n_blocks = site.n_blocks - unit * BLOCKS;
    stage<KEY_WORDS / 4>(site.memory, rows.keys, site.key_row, site.key_pieces, n_blocks, lane);
    u32* gains = site.memory + GAINS_AT;
    if (KEY_GAIN) stage<1>(gains, rows.keys + site.key_gain_word, site.key_row, 1, n_blocks, lane);
    if (VALUE_GAIN)
        stage<1>(
            gains + 4 * BLOCKS * (1 + phase), rows.values + site.value_gain_word, site.value_row, 1, n_blocks, lane
        );
}

__device__ __forceinline__ void stage_queries(const Site& site, int turn, int lane) {
    const uint4* from = site.absorbed + (size_t)turn * site.turn_stride * (KEY_SETS * 32) + lane;
    const u32 place = shared_address(site.memory + QUERIES_AT) + 16 * lane;
#pragma unroll
    for (int set = 0; set < KEY_SETS; set++) copy_16(place + 512 * set, from + 32 * set);
}

__device__ __forceinline__ void stage_values(const Site& site, const Rows& rows, int unit, int lane) {
    stage<VALUE_WORDS / 4>(
        site.memory + VALUES_AT, rows.values, site.value_row, site.value_pieces, site.n_blocks - unit * BLOCKS, lane
    );
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
        for (int i = 0; i < 4; i++) high[t][i] = low[t][i] = 0;
    score_numbers(numbers, from.f + at, group, queries, c);
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

// Sums of a set of codes over the tokens of a unit, as integers times the unit of the weights and what place a code has
// in its byte: of component 4 r + 2 j + h and column 2 c + k in [j][2 h + k].
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

// A unit of tokens. As soon as its keys are done with, those of unit `next` are asked for, and so with its values.
// phase: 0 and 1 in turn.
__device__ __forceinline__ void attend_unit(
    State& state, const Site& site, const Group& keys, const Group& values, const Lane& key_lane,
    const Lane& value_lane, const u8* mask, int unit, int next, int lo, int hi, int phase, int lane
) {
    const int r = lane / 4, c = lane % 4;
    const float4* own_biases = site.biases + (size_t)(unit >> site.turn_shift) * site.turn_stride * 8 + 2 * c;
    const float4 bias[2] = {own_biases[0], own_biases[1]};
    const int next_page = page_of(site, next >= 0 ? next : unit);
    wait<1>();
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
        stage_keys(site, rows_of(site, next, next_page), next, 1 - phase, lane);
        if (next >> site.turn_shift != unit >> site.turn_shift) stage_queries(site, next >> site.turn_shift, lane);
    }
    commit();

    if (HAS_MASK || unit * UNIT_TOKENS < lo || unit * UNIT_TOKENS + UNIT_TOKENS > hi) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) hide_unseen(s[b], mask, unit * UNIT_TOKENS + 32 * b, lo, hi, r);
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
    shrink_sums(state, high);
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
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
            sum_numbers(sums, weights[b].numbers, value_lane.f + b * VALUE_WORDS, values, set, r);
#pragma unroll
        for (int i = 0; i < 8; i++)
            state.sums[set][i / 4][i % 4] += sums[i / 4][i % 4] * (factor[i % 2] * (WEIGHT_ONE / WEIGHT_SCALE));
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
        for (int i = 0; i < 8; i++) state.sums[set][i / 4][i % 4] += (float)sums[i / 4][i % 4] * factor[i % 2];
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
    if (next >= 0) stage_values(site, rows_of(site, next, next_page), next, lane);
    commit();
}

// Grid: (splits * PASSES, groups, batch); passes over the same tokens are neighbours, so that the L2 still has them.
// Splits share the units of a sequence, and a split's warps its own. stats: [batch, passes, splits, 3, 8]: largest
// score, sum of weights, sum of weights times gains; sums: [batch, passes, splits, 32 VALUE_SETS, 8], codes times what
// place they have in their bytes. Shared: WARPS * STAGE_WORDS + BEYOND words, and
// at least WARPS * 256 VALUE_SETS.
// In pages, the grid is (splits of all * PASSES, groups), the sums without the batch; splits: of each its query token, or -1,
// which of the token's it is, and how many that has.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) attend(
    const u32* key_words, const u32* value_words, const Group* key_groups, const Group* value_groups,
    const uint4* absorbed, const float4* biases, const int* first, const int* last, const u8* mask, float* stats,
    float* sums, int n_blocks, int n_turns, int turn_shift, int key_row, int value_row, int key_blocks,
    int value_blocks, int key_gain_word, int value_gain_word, int mask_stride
    PAGED(, const int* rows, const int* all_pages, const int* splits, int pages_row, int page_words)
) {
    DYNAMIC_SHARED(u32, all_memory);
    __shared__ float shared[WARPS][3][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4, r = lane / 4;
    const int group = blockIdx.y, pass = group * PASSES + blockIdx.x % PASSES, n_passes = gridDim.y * PASSES;
#if PAGE_BLOCKS
    splits += blockIdx.x / PASSES * 3;
    const int batch = splits[0], split = splits[1], n_splits = splits[2];
    const size_t entry = (size_t)pass * (gridDim.x / PASSES) + blockIdx.x / PASSES;
    if (batch < 0) {
        await_previous();
        return;
    }
    const int lo = *first, hi = last[batch];
    n_blocks = (hi + 31) / 32;  // rows after them might never have been written
#else
    const int batch = blockIdx.z, split = blockIdx.x / PASSES, n_splits = gridDim.x / PASSES;
    const size_t entry = ((size_t)batch * n_passes + pass) * n_splits + split;
    const int lo = first[batch], hi = min(last[batch], n_blocks * 32);
#endif
    const Group keys = key_groups[group], values = value_groups[group];
    // Splits share what counts of this sequence, however long the others are.
    const int start = lo / UNIT_TOKENS, n_used = max((hi + UNIT_TOKENS - 1) / UNIT_TOKENS - start, 0);
    const int begin = n_used * split / n_splits, n_own = n_used * (split + 1) / n_splits - begin;
    const int from = start + begin + n_own * warp / WARPS, end = start + begin + n_own * (warp + 1) / WARPS;
    if (HAS_MASK) mask += (size_t)batch * mask_stride;
    u32* memory = all_memory + warp * STAGE_WORDS;
    const Site site = {
#if PAGE_BLOCKS
        key_words + keys.first,
        value_words + values.first,
        all_pages + (size_t)rows[batch] * pages_row,
        page_words,
#else
        key_words + (size_t)batch * key_blocks * key_row + keys.first,
        value_words + (size_t)batch * value_blocks * value_row + values.first,
#endif
        absorbed + (size_t)(batch * n_turns * n_passes + pass) * (KEY_SETS * 32),
        biases + (size_t)(batch * n_turns * n_passes + pass) * 8,
        key_row,
        value_row,
        keys.words / 4,
        values.words / 4,
        key_gain_word - keys.first,
        value_gain_word - values.first,
        n_blocks,
        turn_shift,
        n_passes,
        memory,
    };
    const Lane key_lane = {
        number_keys(memory, r, c), memory + keys.n + 16 * c + 2 * (r ^ ((c & 2) << 1)), memory + keys.p + 8 * c + r,
        memory + keys.s + 4 * c + r / 2
    };
    u32* own_values = memory + VALUES_AT;
    const Lane value_lane = {
        number_values(own_values, r, c), own_values + values.n + 16 * r + 4 * c, own_values + values.p + 8 * r + 2 * c,
        own_values + values.s + 4 * r + c
    };
    State state;
    begin_sums(state);
    if (from < end) {
        const Rows first_rows = rows_of(site, from, page_of(site, from));
        stage_keys(site, first_rows, from, 0, lane);
        stage_values(site, first_rows, from, lane);
    }
    await_previous();
    if (from < end) stage_queries(site, from >> turn_shift, lane);
    commit();
    commit();  // elsewhere the one of the values
    int phase = 0;
#pragma unroll 1
    for (int unit = from; unit < end; unit++, phase ^= 1)
        attend_unit(
            state, site, keys, values, key_lane, value_lane, mask, unit, unit + 1 < end ? unit + 1 : -1, lo, hi, phase,
            lane
        );
    let_next_begin();

    add_up(state, 1.0f, shared, (float2*)all_memory, stats + entry * 24, (float2*)sums + entry * (128 * VALUE_SETS));
}
