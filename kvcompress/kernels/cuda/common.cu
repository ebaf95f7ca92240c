// Decode attention over a packed cache whose keys are un-rotated turn by turn, compiled by NVRTC: these files one after
// the other, as turned.py orders them.
//
// Where there are codes, three launches:
// 1. prepare: q' = D^T R_-c q for every turn, laid out as the matrix units want it; attention over exact tokens.
// 2. attend: a warp scores 64 or 128 packed tokens of one group of KV heads at a time, online softmax, value sums.
// 3. combine: splits added up, values decoded, joined with the exact tokens.
// Where all components are float16 numbers, two: attend_numbers does what the first two do, then combine.
//
// From compute capability 9.0 on, attend may begin while prepare ends, and combine while the launch before it ends:
// each of their thread blocks, whatever it has to do, waits for the launch before it (await_previous) before it reads
// what that one wrote, or writes anything. So combine ends after attend has, and attend after prepare has. The first
// launch begins after all that came before it has ended, and may write where launches of an earlier layer read.
//
// Compile-time constants, defined in front of this text by turned.py:
//   HEAD_DIM; GROUP_HEADS, GROUP_COLUMNS: KV heads of a group, query heads of a KV head, of these at most 8. PASS_HEADS:
//   KV heads whose queries are the 8 columns of a product: as many as fit. A group of more takes several passes.
//   KF KN KP KS, VF VN VP VS: sets of 32 components of each class, the most of any group. Classes: F, float16 numbers;
//   N, nibbles (a component of 8 bits is two of them); P, pairs of bits; S, single bits.
//   KEY_WORDS, VALUE_WORDS: of a group in a row, the most of any. KEY_HOLES, VALUE_HOLES: 1 where a set of F of some
//   group is not full. WARPS: of a thread block of `attend`; BLOCKS: packed blocks that a warp takes at once, its unit.
//   Of `attend_numbers`: WARPS, those that attend; SLOTS, places of each for keys or values of one packed block;
//   ABSORBERS, warps beside them. PREPARE_WARPS, COMBINE_THREADS: of a thread block; RING: halves of sets of a decoder
//   that prepare keeps on their way. EXACT_TOKENS: of a warp, the rows of a product, 16. TURN_ROWS: turns whose queries
//   of one KV head are the rows of a product.
//   PAGE_BLOCKS: packed blocks of a page, or 0 where the rows of a sequence lie one after the other; EXACT_PAGE: exact
//   tokens of a page. In pages the "sequences" of a batch are query tokens, each with a row of the tables of pages,
//   tokens that it sees, and how many of them are packed; which thread block takes which is in a schedule (paged.py).
//   KEY_GAIN, VALUE_GAIN, HAS_MASK: 0 or 1. QUERY_BF16: whether queries, keys, values and outputs are bfloat16 numbers
//   instead of float16 ones.
//
// The row of a block of 32 tokens is in the order in which lanes load it (docs/format.md, tiles): a word is a row of an
// operand of mma.m16n8k32 once it is masked, lane = 4 r + c. Codes stay where they are in their bytes, times 1 and 16
// for the two halves of the rows of scores, times powers of two for the rows of value sums; what they are multiplied by
// (absorbed queries, weights) are 16-bit fixed-point numbers in two 8-bit halves.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

// What only kernels that read pages have.
#if PAGE_BLOCKS
#define PAGED(...) __VA_ARGS__
#else
#define PAGED(...)
#endif

#define PASSES ((GROUP_HEADS + PASS_HEADS - 1) / PASS_HEADS)  // of a group
#define KEY_SETS (KF + KN + KP + KS)
#define VALUE_SETS (VF + VN + VP + VS)
#define KEY_CODES (KN + KP + KS > 0)
#define VALUE_CODES (VN + VP + VS > 0)
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

// The same of the numbers that queries and exact tokens are stored as.
__device__ __forceinline__ void mma_stored(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (QUERY_BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        mma(d, a0, a1, a2, a3, b0, b1);
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

// What is read once: the L2 may let go of it first.
__device__ __forceinline__ u64 first_to_go() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_16_once(u32 to, const void* from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "l"(policy)
                 : "memory");
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

// Which pass over its group's codes a KV head's queries take part in, of all passes of all groups; its first column there.
__device__ __forceinline__ int pass_of(int head) {
    return head / GROUP_HEADS * PASSES + head % GROUP_HEADS / PASS_HEADS;
}

__device__ __forceinline__ int column_of(int head) { return head % GROUP_HEADS % PASS_HEADS * GROUP_COLUMNS; }

// Which tokens the query tokens of a batch see: rows of the tables, tokens, those of them that are packed.
struct Seen {
    const int *rows, *lengths, *encoded;
};

// What a row of the packed cache holds of one group: where it begins and how many words it has; where its classes N, P
// and S begin in it (F is the first); its components of class F.
struct Group {
    int first, words, n, p, s, numbers;
};

// Offset of the codes of a set: 2^(bits - 1) - 1/2.
__device__ __forceinline__ float offset_of(int set, int numbers, int nibbles, int pairs) {
    return set < numbers ? 0.0f : set < numbers + nibbles ? 7.5f : set < numbers + nibbles + pairs ? 1.5f : 0.5f;
}
