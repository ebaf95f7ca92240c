// ----------------------------------------------------------------------------------------------------- attend_numbers

// Words of the place of one block of keys or of values, of all places, of the queries of a turn.
#define SLOT_WORDS (KEY_WORDS > VALUE_WORDS ? KEY_WORDS : VALUE_WORDS)
#define SLOTS_WORDS (WARPS * SLOTS * SLOT_WORDS)
#define TURN_WORDS (128 * KEY_SETS)
// Queries of TURN_ROWS turns, [TURN_ROWS, KEY_SETS, 32 lanes] of eight float16 numbers, and what the mean adds to their
// scores, [TURN_ROWS, 8].
#define BATCH_WORDS (TURN_ROWS * (TURN_WORDS + 8))
// What the first of them are made of: the group's queries, the angles of the turns, the mean.
#define INPUT_WORDS (HEAD_DIM / 2 * (GROUP_HEADS * GROUP_COLUMNS + 2 * TURN_ROWS + 2 * GROUP_HEADS))
#define CHUNKS_AHEAD (HEAD_DIM <= 128 ? 2 : 1)  // of a decoder that a warp asks for before anything

// What of the cache belongs to one group of a sequence. rows: words of a row of keys and of values; pieces: of 16 bytes
// of the group in a row. The blocks that count end at `end`.
struct Source {
    const u32* words[2];
    int rows[2], pieces[2], end;
};

// Asks for a block's keys (part 0) or values (part 1), if it counts.
template <int PART>
__device__ __forceinline__ void fill(u32* slot, const Source& source, int block, int lane) {
    constexpr int most = (PART ? VALUE_WORDS : KEY_WORDS) / 4;
    u32 to = shared_address(slot) + 16 * lane;
    const char* from = (const char*)(source.words[PART] + (size_t)block * source.rows[PART]) + 16 * lane;
    pin(to, from);
    const int pieces = block < source.end ? source.pieces[PART] - lane : 0;
#pragma unroll
    for (int i = 0; i < most; i += 32)
        if (i < pieces) copy_16(to + 16 * i, from + 16 * i);
    commit();
}

// What queries are absorbed with. query: of the group's first column, q_head apart; decoder, key_mean: of its first
// head; angles: of the first of n_turns turns.
struct Absorbed {
    const u16* query;
    const uint4* decoder;
    const float* key_mean;
    const float2* angles;
    int q_head, n_turns;
};

// Copies that input: as many turns of it as there are.
__device__ __forceinline__ void stage_input(
    u16* query, float2* angles, float* key_mean, const Absorbed& from, int thread
) {
    constexpr int threads = 32 * ABSORBERS;
    for (int i = 8 * thread; i < GROUP_HEADS * GROUP_COLUMNS * HEAD_DIM; i += 8 * threads)
        copy_16(shared_address(query + i), from.query + i / HEAD_DIM * from.q_head + i % HEAD_DIM);
    for (int i = 2 * thread; i < min(TURN_ROWS, from.n_turns) * (HEAD_DIM / 2); i += 2 * threads)
        copy_16(shared_address(angles + i), from.angles + i);
    for (int i = 4 * thread; i < GROUP_HEADS * HEAD_DIM; i += 4 * threads)
        copy_16(shared_address(key_mean + i), from.key_mean + i);
    commit();
}

// Absorbs TURN_ROWS turns. Workers, which are warps, share the halves of sets of a head, and the heads. between: what
// is to be done once the decoder has been asked for.
template <class Between>
__device__ __forceinline__ void absorb_turns(
    u32* queries, int worker, int n_workers, const Absorbed& from, float scale, const Between& between
) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, dim = c * (HEAD_DIM / 8);
    const int per_head = max(n_workers / GROUP_HEADS, 1);
    const int first = worker / GROUP_HEADS < per_head ? worker / GROUP_HEADS : CHUNKS;
    float* means = (float*)(queries + TURN_ROWS * TURN_WORDS);
#pragma unroll 1
    for (int head = worker % GROUP_HEADS; head < GROUP_HEADS; head += n_workers) {
        const uint4* decoder = from.decoder + head * (CHUNKS * CHUNK_SIZE) + lane;
        Chunk ahead[CHUNKS_AHEAD];
#pragma unroll
        for (int i = 0; i < CHUNKS_AHEAD; i++)
            load_chunk(ahead[i], decoder + min(first + i * per_head, CHUNKS - 1) * CHUNK_SIZE);
        if (head == worker % GROUP_HEADS) between();
        u32 q[2 * STEPS][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = r + 8 * half, own = row % PADDED_COLUMNS, turn = row / PADDED_COLUMNS;
            const float of_mean = row_sum(turn_back(
                q, half, own < GROUP_COLUMNS && turn < from.n_turns,
                from.query + (head * GROUP_COLUMNS + own) * from.q_head + dim,
                from.angles + turn * (HEAD_DIM / 2) + dim, from.key_mean + head * HEAD_DIM + dim
            ));
            if (first == 0 && c == 0 && own < GROUP_COLUMNS)
                means[turn * 8 + head * GROUP_COLUMNS + own] = of_mean * scale;
        }
        auto absorb = [&](int chunk, const Chunk& its_decoder) {
            float x[2][4];
            absorb_chunk(x, q, its_decoder);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = r + 8 * half, own = row % PADDED_COLUMNS;
                u32* to = queries + row / PADDED_COLUMNS * TURN_WORDS + chunk / 2 * 128 + chunk % 2 * 2;
                if (own < GROUP_COLUMNS)
                    *(uint2*)(to + ((head * GROUP_COLUMNS + own) * 4 + c) * 4) =
                        stored_four(x[half], scale * QUERY_SCALE);
            }
        };
#pragma unroll
        for (int i = 0; i < CHUNKS_AHEAD; i++)
            if (first + i * per_head < CHUNKS) absorb(first + i * per_head, ahead[i]);
#pragma unroll 1
        for (int chunk = first + CHUNKS_AHEAD * per_head; chunk < CHUNKS; chunk += per_head) {
            load_chunk(ahead[0], decoder + chunk * CHUNK_SIZE);
            absorb(chunk, ahead[0]);
        }
    }
}

// Weights of a block's tokens from their scores s, which sums so far are brought to one scale with: two tokens a word,
// as sum_numbers takes them. s: of token 16 t + 8 h + r and column 2 c + k in [t][2 h + k], overwritten.
__device__ __forceinline__ void weigh(
    u32 (&weights)[2][2], State& state, float (&s)[2][4], const u8* mask, int block, int lo, int hi, int r
) {
    if (HAS_MASK || 32 * block < lo || 32 * block + 32 > hi) hide_unseen(s, mask, 32 * block, lo, hi, r);
    float base[2], shrink[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float high = fmaxf(fmaxf(s[0][k], s[0][2 + k]), fmaxf(s[1][k], s[1][2 + k]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
        high = fmaxf(high, state.top[k]);
        shrink[k] = exp_2(state.top[k] - high);
        base[k] = high == NEVER ? 0.0f : high;  // where nothing was seen, weights must be 0 and not 1
        state.top[k] = high;
    }
    shrink_sums(state, shrink);
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float x = exp_2(s[t][2 * h] - base[0]), y = exp_2(s[t][2 * h + 1] - base[1]);
            state.total[0] += x;
            state.total[1] += y;
            weights[t][h] = transposed(to_half2(x * WEIGHT_SCALE, y * WEIGHT_SCALE));
        }
}

// Grid: (splits, groups, batch). Splits share the blocks of a sequence, a split's first WARPS warps take them in turn,
// and each keeps SLOTS of keys and values on their way. The other ABSORBERS absorb the queries of the turns to come,
// and attend to exact tokens; all of them those of the first turns, while the first keys come. stats, sums: as of
// attend. Shared: SLOTS_WORDS (at least WARPS * 256 VALUE_SETS) + 2 BATCH_WORDS + INPUT_WORDS words.
extern "C" __global__ void __launch_bounds__(32 * (WARPS + ABSORBERS), 1) attend_numbers(
    const u16* query, const uint4* decoder, const float* key_mean, const float2* angles, EXACT_TENSORS,
    const u32* key_words, const u32* value_words, const Group* key_groups,
    const Group* value_groups, const int* first, const int* last, const u8* mask, float* stats, float* sums,
    int angle_batch, EXACT_SIZES, int n_blocks, int n_turns,
    int turn_shift, int key_row, int value_row, int key_blocks, int value_blocks, int mask_stride, double scaling
) {
    DYNAMIC_SHARED(u32, all_memory);
    __shared__ float shared[WARPS][3][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4, r = lane / 4;
    const int split = blockIdx.x, group = blockIdx.y, batch = blockIdx.z, n_groups = gridDim.y;
    const float scale = (float)scaling;
    const Group key_group = key_groups[group], value_group = value_groups[group];
    const int lo = first[batch], hi = min(last[batch], n_blocks * 32);
    // Splits share what counts of this sequence, however long the others are.
    const int start = lo / 32, n_used = max((hi + 31) / 32 - start, 0);
    const int begin = start + n_used * split / gridDim.x, end = start + n_used * (split + 1) / gridDim.x;
    const Source source = {
        {key_words + (size_t)batch * key_blocks * key_row + key_group.first,
         value_words + (size_t)batch * value_blocks * value_row + value_group.first},
        {key_row, value_row},
        {key_group.words / 4, value_group.words / 4},
        end,
    };
    u32* slots = all_memory + warp * (SLOTS * SLOT_WORDS);
    u32* queries = all_memory + SLOTS_WORDS;
    const int first_head = group * GROUP_HEADS, first_turn = begin >> turn_shift;
    const Absorbed input = {
        query + (size_t)batch * q_batch + first_head * GROUP_COLUMNS * q_head,
        decoder + first_head * (CHUNKS * CHUNK_SIZE),
        key_mean + first_head * HEAD_DIM,
        angles + (size_t)batch * angle_batch + (size_t)first_turn * (HEAD_DIM / 2),
        q_head,
        n_turns - first_turn,
    };
    // The first queries' input goes to shared memory, asked for beside the first keys and values: what is asked for
    // after these comes after them.
    u16* own_query = (u16*)(queries + 2 * BATCH_WORDS);
    float2* own_angles = (float2*)(own_query + GROUP_HEADS * GROUP_COLUMNS * HEAD_DIM);
    float* own_mean = (float*)(own_angles + TURN_ROWS * (HEAD_DIM / 2));
    auto ask = [&] {
        // Columns of no query are computed as well, so that they must hold numbers.
        if (GROUP_HEADS * GROUP_COLUMNS < 8)
            for (int i = threadIdx.x; i < 2 * BATCH_WORDS; i += 32 * (WARPS + ABSORBERS)) queries[i] = 0;
        if (warp >= WARPS) {
            stage_input(own_query, own_angles, own_mean, input, threadIdx.x - 32 * WARPS);
            wait<0>();
        } else {
#pragma unroll
            for (int i = 0; i < SLOTS; i++) {
                const int block = begin + warp + WARPS * (i / 2);
                if (i % 2)
                    fill<1>(slots + i * SLOT_WORDS, source, block, lane);
                else
                    fill<0>(slots + i * SLOT_WORDS, source, block, lane);
            }
        }
        __syncthreads();
    };
    absorb_turns(
        queries, warp, WARPS + ABSORBERS,
        Absorbed{own_query, input.decoder, own_mean, own_angles, HEAD_DIM, input.n_turns}, scale, ask
    );
    if (warp >= WARPS) {
        for (int turn = first_turn; turn << turn_shift < end; turn += TURN_ROWS) {
            __syncthreads();
            const int next = turn + TURN_ROWS;
            if (next << turn_shift >= end) continue;
            Absorbed from = input;
            from.angles += (size_t)(next - first_turn) * (HEAD_DIM / 2);
            from.n_turns -= next - first_turn;
            absorb_turns(
                queries + (next - first_turn) / TURN_ROWS % 2 * BATCH_WORDS, warp - WARPS, ABSORBERS, from, scale, [] {}
            );
        }
        const Exact exact = EXACT();
        const int n_kv_heads = n_groups * GROUP_HEADS, parts = EXACT_PARTS(n_sinks + n_recent);
        for (int i = split + gridDim.x * (warp - WARPS); i < GROUP_HEADS * parts; i += gridDim.x * ABSORBERS)
            attend_exact(
                exact, (batch * n_kv_heads + first_head) * parts + i, query, n_kv_heads, q_batch, q_head, scale
            );
        __syncthreads();  // those of add_up
        __syncthreads();
        return;
    }
    if (HAS_MASK) mask += (size_t)batch * mask_stride;

    State state;
    begin_sums(state);
    int slot = 0, block = begin + warp;
    auto next_slot = [&] { slot = slot + 1 == SLOTS ? 0 : slot + 1; };
#pragma unroll 1
    for (int turn = first_turn; turn << turn_shift < end; turn += TURN_ROWS) {
        __syncthreads();  // their queries are there, and nobody needs those before any longer
        const u32* batch_queries = queries + (turn - first_turn) / TURN_ROWS % 2 * BATCH_WORDS;
        const float* means = (const float*)(batch_queries + TURN_ROWS * TURN_WORDS);
        const int stop = min(end, (turn + TURN_ROWS) << turn_shift);
#pragma unroll 1
        for (; block < stop; block += WARPS) {
            const int own = (block >> turn_shift) - turn;
            wait<SLOTS - 1>();
            __syncwarp();
            float s[2][4];  // of token 16 t + 8 h + r and column 2 c + k in [t][2 h + k]
            score_numbers(
                s, number_keys(slots + slot * SLOT_WORDS, r, c), key_group,
                (const uint4*)(batch_queries + own * TURN_WORDS) + lane, c
            );
            __syncwarp();
            fill<SLOTS % 2>(slots + slot * SLOT_WORDS, source, block + WARPS * (SLOTS / 2), lane);
            next_slot();
            const float2 mean = *(const float2*)(means + own * 8 + 2 * c);
#pragma unroll
            for (int t = 0; t < 2; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[t][i] = s[t][i] * (1.0f / QUERY_SCALE) + (i % 2 ? mean.y : mean.x);
            u32 weights[2][2];
            weigh(weights, state, s, mask, block, lo, hi, r);
            wait<SLOTS - 1>();
            __syncwarp();
#pragma unroll
            for (int set = 0; set < VF; set++)
                sum_numbers(
                    state.sums[set], weights, number_values(slots + slot * SLOT_WORDS, r, c), value_group, set, r
                );
            __syncwarp();
            fill<(SLOTS + 1) % 2>(slots + slot * SLOT_WORDS, source, block + WARPS * ((SLOTS + 1) / 2), lane);
            next_slot();
        }
    }
    let_next_begin();
    wait<0>();
    const size_t entry = ((size_t)batch * n_groups + group) * gridDim.x + split;
    add_up(
        state, 1.0f / WEIGHT_SCALE, shared, (float2*)all_memory, stats + entry * 24,
        (float2*)sums + entry * (128 * VALUE_SETS)
    );
}
