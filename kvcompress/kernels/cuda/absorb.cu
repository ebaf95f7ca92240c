// ------------------------------------------------------------------------------------------------------------- absorb

#define PADDED_COLUMNS (16 / TURN_ROWS)
#define CHUNKS (2 * KEY_SETS)        // of a head's decoder: halves of sets
#define CHUNK_SIZE (2 * STEPS * 32)  // in uint4

// One row of this lane's: a query turned back to a turn's first position, R_-c q, as the first factor of products of 16
// dimensions; half: whether it is row r or r + 8. query, angle, key_mean: from dimension c HEAD_DIM / 8 on. Returns
// this lane's part of what the mean adds to a score.
__device__ __forceinline__ float turn_back(
    u32 (&q)[2 * STEPS][4], int half, bool wanted, const u16* query, const float2* angle, const float* key_mean
) {
    float of_mean = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint2 low = make_uint2(0, 0), high = make_uint2(0, 0);
        float4 turned[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};  // cos and sin of the turn's position
        if (wanted) {
            low = *(const uint2*)(query + 4 * step);
            high = *(const uint2*)(query + 4 * step + HEAD_DIM / 2);
            turned[0] = *(const float4*)(angle + 4 * step);
            turned[1] = *(const float4*)(angle + 4 * step + 2);
        }
        const float4 m_re = *(const float4*)(key_mean + 4 * step),
                     m_im = *(const float4*)(key_mean + 4 * step + HEAD_DIM / 2);
        const float x[4] = {number(low.x & 0xffff), number(low.x >> 16), number(low.y & 0xffff), number(low.y >> 16)};
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
        of_mean += re[0] * m_re.x + re[1] * m_re.y + re[2] * m_re.z + re[3] * m_re.w;
        of_mean += im[0] * m_im.x + im[1] * m_im.y + im[2] * m_im.z + im[3] * m_im.w;
        q[step][half] = to_half2(re[0], re[1]);
        q[step][2 + half] = to_half2(re[2], re[3]);
        q[STEPS + step][half] = to_half2(im[0], im[1]);
        q[STEPS + step][2 + half] = to_half2(im[2], im[3]);
    }
    return of_mean;
}

// Sum over the lanes of a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Half a set of a head's decoder: [2 tiles, STEPS, 32 lanes] of 8 float16 numbers, this lane's of each, for two products.
typedef uint4 Chunk[2][STEPS];

__device__ __forceinline__ void load_chunk(Chunk& chunk, const uint4* from) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int tile = 0; tile < 2; tile++) chunk[tile][step] = from[(tile * STEPS + step) * 32];
}

// Both rows times half a set of a head's decoder: [half][4 components].
__device__ __forceinline__ void absorb_chunk(
    float (&x)[2][4], const u32 (&q)[2 * STEPS][4], const Chunk& chunk
) {
    float d[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
    for (int step = 0; step < 2 * STEPS; step++)
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const uint4& two = chunk[tile][step / 2];
            const u32 b0 = step % 2 ? two.z : two.x, b1 = step % 2 ? two.w : two.y;
            mma(d[tile], q[step][0], q[step][1], q[step][2], q[step][3], b0, b1);
        }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[half][i] = d[i / 2][2 * half + i % 2];
}

// Four of these as float16 numbers.
__device__ __forceinline__ uint2 stored_four(const float (&x)[4], float to_stored) {
    return make_uint2(
        to_half2(clamped(x[0] * to_stored), clamped(x[1] * to_stored)),
        to_half2(clamped(x[2] * to_stored), clamped(x[3] * to_stored))
    );
}
