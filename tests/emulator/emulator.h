// A CUDA thread block on one CPU thread: lanes are fibers, and everything that a warp or a block does together waits
// for all. Copies to shared memory land when they are waited for; until then their place holds garbage. Reads through
// __ldg and copies are checked against the tensors that a launch was given. What the launches before one wrote that may
// begin earlier reads as NaN until await_previous.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulator::shared.data()

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct dim3 {
    int x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

inline dim3 threadIdx, blockIdx, gridDim;

namespace emulator {
struct Copy {
    unsigned to;
    const void* from;
};
struct Fiber {
    jmp_buf place;
    bool begun = false, done = false;
    std::vector<std::vector<Copy>> groups;  // committed; the last one is open
};
struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};
inline std::vector<char> shared;
inline std::vector<std::pair<const char*, size_t>> tensors;
struct Output {
    char* begin;
    std::vector<char> content;  // while `begin` holds none of it
};
inline std::vector<Output> previous;  // of the launches since the last that was plain
inline bool awaited = true;
inline std::vector<Fiber> fibers;
inline std::vector<std::vector<char>> stacks;  // of fibers, kept from block to block
inline std::vector<Barrier> warps;
inline Barrier block;
inline std::vector<std::array<unsigned, 8>> slots;  // of each thread, for what a warp exchanges
inline jmp_buf scheduler;
inline int current = 0;
inline void (*body)();

inline void fail(const char* what) {
    std::fprintf(
        stderr, "emulator: %s (block %d %d %d, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, current
    );
    std::abort();
}

inline void check(const void* p, size_t n) {
    for (auto [begin, size] : tensors)
        if ((const char*)p >= begin && (const char*)p + n <= begin + size) return;
    fail("a read outside of all tensors");
}

// A ucontext only begins a fiber: each swap of two asks the kernel for the mask of signals, a jump does not.
inline void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
    threadIdx = {current, 0, 0};
}

inline void arrive(Barrier& barrier, int expected) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    while (barrier.generation == generation) yield();
}

inline void sync_warp() { arrive(warps[current / 32], 32); }

inline std::array<unsigned, 8>* exchange(
    std::array<unsigned, 8> mine
) {  // the slots of this lane's warp, after all wrote
    slots[current] = mine;
    sync_warp();
    return &slots[current / 32 * 32];
}

inline void enter() {
    body();
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

inline void begin() {
    const size_t size = 1 << 17;
    while (stacks.size() <= current) stacks.emplace_back(size);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks[current].data(), 0, size};
    makecontext(&context, enter, 0);
    fibers[current].begun = true;
    setcontext(&context);
}

inline void go_on() {  // until it waits or ends
    if (_setjmp(scheduler)) return;
    if (fibers[current].begun) _longjmp(fibers[current].place, 1);
    begin();
}

inline void hide_previous() {
    for (auto& [begin, content] : previous) {
        std::memcpy(content.data(), begin, content.size());
        std::memset(begin, 0xff, content.size());
    }
    awaited = false;
}

inline void show_previous() {
    for (auto& [begin, content] : previous) std::memcpy(begin, content.data(), content.size());
    awaited = true;
}

inline void run_block(int n_threads) {
    fibers = std::vector<Fiber>(n_threads);
    warps.assign((n_threads + 31) / 32, {});
    block = {};
    slots.assign(n_threads, {});
    std::memset(shared.data(), 0xff, shared.size());
    for (auto& fiber : fibers) fiber.groups.emplace_back();
    static bool backwards = false;  // every other block, so that nothing depends on which warp is ahead
    backwards = !backwards;
    for (bool any = true; any;) {
        any = false;
        for (int i = 0; i < n_threads; i++) {
            current = backwards ? n_threads - 1 - i : i;
            if (fibers[current].done) continue;
            any = true;
            threadIdx = {current, 0, 0};
            go_on();
        }
    }
}

// overlaps: whether the kernel may begin while the launch before it ends. arguments: as for cuLaunchKernel, a pointer
// to each. sizes: of the tensors among them, in bytes, 0 for others.
template <class... A>
void launch(
    void (*kernel)(A...), bool overlaps, const int* grid, int n_threads, int n_shared, void** arguments,
    const size_t* sizes
) {
    tensors.clear();
    for (size_t i = 0; i < sizeof...(A); i++)
        if (sizes[i]) tensors.emplace_back(*(const char**)arguments[i], sizes[i]);
    shared.assign(n_shared + 16, 0);
    gridDim = {grid[0], grid[1], grid[2]};
    [&]<size_t... I>(std::index_sequence<I...>) {
        static std::tuple<void (*)(A...), A...> call;
        call = {kernel, *(std::remove_reference_t<A>*)arguments[I]...};
        body = [] { std::apply([](auto kernel, auto... values) { kernel(values...); }, call); };
    }(std::index_sequence_for<A...>{});
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
                if (overlaps) hide_previous();
                run_block(n_threads);
                if (!awaited) fail("a block that did not wait for the launch before it");
            }
    if (!overlaps) previous.clear();
    const bool written[] = {std::is_pointer_v<A> && !std::is_const_v<std::remove_pointer_t<A>>...};
    for (size_t i = 0; i < sizeof...(A); i++)
        if (written[i] && sizes[i]) previous.push_back({*(char**)arguments[i], std::vector<char>(sizes[i])});
}

inline float half_to_float(unsigned bits) {
    uint16_t low = bits & 0xffff;
    _Float16 h;
    std::memcpy(&h, &low, 2);
    return (float)h;
}

inline unsigned float_to_half(float x) {
    _Float16 h = (_Float16)x;
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}
}  // namespace emulator

inline unsigned __float_as_uint(float x) {
    unsigned u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float __uint_as_float(unsigned u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
template <class T>
T __ldg(const T* p) {
    emulator::check(p, sizeof(T));
    return *p;
}
inline void __syncthreads() { emulator::arrive(emulator::block, emulator::fibers.size()); }
inline void __syncwarp() { emulator::sync_warp(); }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(both >> (8 * (s >> (4 * i) & 7)) & 0xff) << (8 * i);
    return out;
}

inline float __shfl_xor_sync(unsigned, float x, int mask) {
    const auto* warp = emulator::exchange({__float_as_uint(x)});
    const float other = __uint_as_float(warp[(emulator::current % 32) ^ mask][0]);
    emulator::sync_warp();
    return other;
}

inline bool __any_sync(unsigned, bool x) {
    const auto* warp = emulator::exchange({x});
    bool any = false;
    for (int lane = 0; lane < 32; lane++) any = any || warp[lane][0];
    emulator::sync_warp();
    return any;
}

// ------------------------------------------------------------ the instructions of cuda/common.cu
typedef unsigned int u32;
typedef unsigned short u16;

inline float from_half(u16 h) { return emulator::half_to_float(h); }
inline u32 to_half2(float low, float high) {
    return emulator::float_to_half(low) | emulator::float_to_half(high) << 16;
}
inline u16 to_bfloat16(float x) {
    const u32 u = __float_as_uint(x);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float exp_2(float x) { return std::exp2(x); }

template <float (*NUMBER)(u16)>
inline void mma_numbers(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    auto pair_product = [](u32 x, u32 y) {
        return NUMBER(x & 0xffff) * NUMBER(y & 0xffff) + NUMBER(x >> 16) * NUMBER(y >> 16);
    };
    const auto* warp = emulator::exchange({a0, a1, a2, a3, b0, b1});
    const int lane = emulator::current % 32, r = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int row = r, below = i / 2, column = 2 * c + i % 2;
        for (int k = 0; k < 4; k++) {
            const auto &a = warp[4 * row + k], &b = warp[4 * column + k];
            d[i] += pair_product(a[below], b[4]) + pair_product(a[2 + below], b[5]);
        }
    }
    emulator::sync_warp();
}

inline float from_bfloat16(u16 bits) { return __uint_as_float((u32)bits << 16); }
inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    mma_numbers<from_half>(d, a0, a1, a2, a3, b0, b1);
}
// QUERY_BF16 is defined after this text
#define mma_stored mma_numbers<QUERY_BF16 ? from_bfloat16 : from_half>

template <class B>
inline void mma_integers(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const auto* warp = emulator::exchange({a0, a1, a2, a3, b0, b1});
    const int lane = emulator::current % 32, r = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int below = i / 2, column = 2 * c + i % 2;
        long long sum = d[i];
        for (int k = 0; k < 4; k++)
            for (int byte = 0; byte < 4; byte++)
                for (int half = 0; half < 2; half++) {
                    const int a = warp[4 * r + k][2 * half + below] >> (8 * byte) & 0xff;
                    sum += a * (B)(warp[4 * column + k][4 + half] >> (8 * byte) & 0xff);
                }
        if (sum != (int)sum) emulator::fail("a sum beyond 32 bits");
        d[i] = (int)sum;
    }
    emulator::sync_warp();
}
inline void mma_signed(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    mma_integers<signed char>(d, a0, a1, a2, a3, b0, b1);
}
inline void mma_unsigned(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    mma_integers<unsigned char>(d, a0, a1, a2, a3, b0, b1);
}

inline u32 transposed(u32 x) {
    const auto* warp = emulator::exchange({x});
    const int lane = emulator::current % 32, r = lane / 4, c = lane % 4;
    auto element = [&](int row, int column) { return warp[4 * row + column / 2][0] >> (16 * (column % 2)) & 0xffff; };
    const u32 y = element(2 * c, r) | element(2 * c + 1, r) << 16;
    emulator::sync_warp();
    return y;
}

inline u32 shared_address(const void* p) { return (const char*)p - emulator::shared.data(); }

inline void copy_16(u32 to, const void* from) {
    emulator::check(from, 16);
    if (to % 16 || (size_t)from % 16) emulator::fail("a copy of 16 bytes that is not aligned");
    if (to + 16 > emulator::shared.size()) emulator::fail("a copy beyond shared memory");
    std::memset(emulator::shared.data() + to, 0xff, 16);
    emulator::fibers[emulator::current].groups.back().push_back({to, from});
}

inline unsigned long long first_to_go() { return 0; }
inline void copy_16_once(u32 to, const void* from, unsigned long long) { copy_16(to, from); }

inline void pin(u32&, const char*&) {}
inline void commit() { emulator::fibers[emulator::current].groups.emplace_back(); }

template <int PENDING>
inline void wait() {
    auto& groups = emulator::fibers[emulator::current].groups;
    while (groups.size() > PENDING + 1) {
        for (auto [to, from] : groups.front()) std::memcpy(emulator::shared.data() + to, from, 16);
        groups.erase(groups.begin());
    }
}

inline void let_next_begin() {}

inline void await_previous() {
    __syncthreads();  // so that no thread's reads before it go unnoticed
    if (!emulator::awaited) emulator::show_previous();
    for (auto& group : emulator::fibers[emulator::current].groups)
        for (auto [to, from] : group)
            for (auto& [begin, content] : emulator::previous)
                if (from >= begin && from < begin + content.size())
                    emulator::fail("a copy of what the launch before may not have written yet");
}
