// Runs a CUDA kernel on the CPU, one block after another, and counts what it does to memory.
//
// A thread of a block is a fiber (ucontext). A fiber runs until it ends or waits at a barrier; when all that are left
// wait, the barrier opens. Accesses of the 32 lanes of a warp that come from the same instruction, the same number of
// times since the last barrier, form one request, as on a GPU. From its addresses follow:
//   global memory: sectors, the distinct 32-byte pieces that must move;
//   shared memory: wavefronts, the passes that 32 banks of 4 bytes need (64-bit accesses go by half warps, 128-bit
//   accesses by quarter warps). Wavefronts above the ideal are bank conflicts.
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <set>
#include <tuple>
#include <vector>

struct Three { unsigned x, y, z; };
struct CpuBuiltins { Three thread, block, block_dim, grid_dim; };
CpuBuiltins cpu_builtins;

struct Side { uint64_t accesses, bytes, requests, transactions, ideal; };
struct Counts { Side global_loads, global_stores, shared_loads, shared_stores; uint64_t out_of_bounds, misaligned; };

namespace {
constexpr size_t kStack = 96 * 1024;
constexpr uintptr_t kGuard = 65536;  // the caller leaves this much room on both sides of every buffer
enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Buffer { uintptr_t begin, end; };
struct Access { uintptr_t site; unsigned turn, lane; uintptr_t address; unsigned size; bool store, global; };
struct Warp { std::vector<Access> log; unsigned long long slots[32]; };
struct Fiber {
    ucontext_t context;
    State state;
    Three index;
    unsigned number;
    std::vector<std::pair<uintptr_t, unsigned>> turns;  // how often each instruction ran since the last barrier

    unsigned next_turn(uintptr_t site) {
        for (auto& [known, turn] : turns)
            if (known == site) return ++turn;
        turns.push_back({site, 0});
        return 0;
    }
};

struct Machine {
    std::vector<Buffer> buffers;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    char* stacks = nullptr;
    size_t stacks_size = 0;
    std::set<std::pair<uintptr_t, unsigned>> written;  // shared memory that this block wrote
    ucontext_t scheduler;
    Fiber* current = nullptr;
    void (*kernel)(void**) = nullptr;
    void** args = nullptr;
    Counts counts;
};
Machine* machine = nullptr;

bool inside(uintptr_t address, const void* begin, size_t size) {
    return address - (uintptr_t)begin < size;
}

void record(uintptr_t address, unsigned size, bool store, uintptr_t site) {
    Machine* m = machine;
    if (!m || !m->current || inside(address, m->stacks, m->stacks_size)) return;
    if (inside(address, &cpu_builtins, sizeof cpu_builtins)) return;
    Warp& warp = m->warps[m->current->number / 32];
    if (inside(address, warp.slots, sizeof warp.slots)) return;
    bool global = false;
    for (const Buffer& b : m->buffers) {
        if (address < b.begin - kGuard || address >= b.end + kGuard) continue;
        global = true;
        if (address < b.begin || address + size > b.end) m->counts.out_of_bounds++;
    }
    if (address % size) m->counts.misaligned++;
    if (!global && store) m->written.insert({address, size});
    warp.log.push_back({site, m->current->next_turn(site), m->current->number % 32, address, size, store, global});
}

// Shared memory moves 128 bytes a pass, at most one 4-byte word from each bank (the same word for many lanes is free).
unsigned wavefronts(const Access* first, const Access* last) {
    std::set<uintptr_t> words;
    unsigned per_bank[32] = {};
    for (const Access* a = first; a != last; ++a)
        for (uintptr_t w = a->address / 4; w <= (a->address + a->size - 1) / 4; ++w)
            if (words.insert(w).second) per_bank[w % 32]++;
    return *std::max_element(per_bank, per_bank + 32);
}

void count_request(Counts& counts, const Access* first, const Access* last) {
    Side& side = first->global ? (first->store ? counts.global_stores : counts.global_loads)
                               : (first->store ? counts.shared_stores : counts.shared_loads);
    side.requests++;
    std::set<uintptr_t> sectors;
    uint64_t bytes = 0;
    for (const Access* a = first; a != last; ++a) {
        side.accesses++;
        bytes += a->size;
        for (uintptr_t s = a->address / 32; s <= (a->address + a->size - 1) / 32; ++s) sectors.insert(s);
    }
    side.bytes += bytes;
    if (first->global) {
        side.transactions += sectors.size();
        side.ideal += (bytes + 31) / 32;
        return;
    }
    const unsigned lanes = first->size <= 4 ? 32 : 128 / first->size;  // lanes that one pass can serve
    for (const Access* a = first; a != last;) {
        const Access* end = a;
        while (end != last && end->lane / lanes == a->lane / lanes) ++end;
        side.transactions += wavefronts(a, end);
        side.ideal++;
        a = end;
    }
}

void flush(Warp& warp) {
    auto key = [](const Access& a) { return std::make_tuple(a.site, a.turn, a.global, a.store, a.lane); };
    std::stable_sort(warp.log.begin(), warp.log.end(),
                     [&](const Access& a, const Access& b) { return key(a) < key(b); });
    for (size_t i = 0; i < warp.log.size();) {
        size_t end = i;
        auto request = [&](size_t at) {
            const Access& a = warp.log[at];
            return std::make_tuple(a.site, a.turn, a.global, a.store);
        };
        while (end < warp.log.size() && request(end) == request(i)) ++end;
        count_request(machine->counts, &warp.log[i], warp.log.data() + end);
        i = end;
    }
    warp.log.clear();
}

void flush_warp(unsigned number) {
    flush(machine->warps[number]);
    for (size_t i = number * 32; i < std::min<size_t>(machine->fibers.size(), number * 32 + 32); ++i)
        machine->fibers[i].turns.clear();
}

void fiber_main() {
    machine->kernel(machine->args);
    machine->current->state = kDone;
    swapcontext(&machine->current->context, &machine->scheduler);
}

void wait_as(State state) {
    Fiber* self = machine->current;
    self->state = state;
    swapcontext(&self->context, &machine->scheduler);
}

// Opens a barrier when every fiber in [begin, end) has ended or waits at it. Returns whether it opened.
bool open_barrier(size_t begin, size_t end, State barrier) {
    bool someone = false;
    for (size_t i = begin; i < end; ++i) {
        if (machine->fibers[i].state == barrier) someone = true;
        else if (machine->fibers[i].state != kDone) return false;
    }
    for (size_t i = begin; someone && i < end; ++i)
        if (machine->fibers[i].state == barrier) machine->fibers[i].state = kReady;
    return someone;
}

bool run_block() {
    Machine& m = *machine;
    const Three size = cpu_builtins.block_dim;
    for (size_t i = 0; i < m.fibers.size(); ++i) {
        Fiber& f = m.fibers[i];
        f.state = kReady;
        f.number = (unsigned)i;
        f.index = {(unsigned)i % size.x, (unsigned)i / size.x % size.y, (unsigned)i / size.x / size.y};
        f.turns.clear();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = m.stacks + i * kStack;
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
    }
    for (;;) {
        bool ran = false, left = false;
        for (Fiber& f : m.fibers) {
            if (f.state == kReady) {
                m.current = &f;
                cpu_builtins.thread = f.index;
                swapcontext(&m.scheduler, &f.context);
                m.current = nullptr;
                ran = true;
            }
            left |= f.state != kDone;
        }
        if (!left) break;
        bool opened = open_barrier(0, m.fibers.size(), kAtBlockBarrier);
        if (opened)
            for (size_t w = 0; w < m.warps.size(); ++w) flush_warp((unsigned)w);
        for (size_t w = 0; w < m.warps.size(); ++w)
            if (open_barrier(w * 32, std::min(m.fibers.size(), w * 32 + 32), kAtWarpBarrier)) {
                flush_warp((unsigned)w);
                opened = true;
            }
        if (!ran && !opened) return false;  // some wait at one barrier, some at another
    }
    for (Warp& warp : m.warps) flush(warp);
    for (auto& [address, bytes] : m.written) memset((void*)address, 0xff, bytes);  // NaN: no block may rely on the last
    m.written.clear();
    return true;
}
}  // namespace

extern "C" {
void cpu_block_barrier() { wait_as(kAtBlockBarrier); }
void cpu_warp_barrier() { wait_as(kAtWarpBarrier); }
unsigned long long* cpu_warp_slots() { return machine->warps[machine->current->number / 32].slots; }

void cpu_vector_copy(void* to, const void* from, unsigned size, void* site) {
    record((uintptr_t)from, size, false, (uintptr_t)site);
    record((uintptr_t)to, size, true, (uintptr_t)site);
    memcpy(to, from, size);
}

// Runs a grid. Returns 0, or 1 when the block's threads wait for each other at different barriers.
int cpu_launch(void (*kernel)(void**), const unsigned* grid, const unsigned* block, void** args, int buffer_count,
               const uintptr_t* begins, const uintptr_t* sizes, Counts* counts) {
    Machine m;
    memset(&m.counts, 0, sizeof m.counts);
    machine = &m;
    for (int i = 0; i < buffer_count; ++i) m.buffers.push_back({begins[i], begins[i] + sizes[i]});
    m.kernel = kernel;
    m.args = args;
    const size_t threads = (size_t)block[0] * block[1] * block[2];
    m.fibers.resize(threads);
    m.warps.resize((threads + 31) / 32);
    static std::unique_ptr<char[]> stacks(new char[1024 * kStack]);  // kept: a page is only paid for once
    m.stacks = stacks.get();
    m.stacks_size = 1024 * kStack;
    cpu_builtins.block_dim = {block[0], block[1], block[2]};
    cpu_builtins.grid_dim = {grid[0], grid[1], grid[2]};
    bool fine = true;
    for (unsigned z = 0; z < grid[2] && fine; ++z)
        for (unsigned y = 0; y < grid[1] && fine; ++y)
            for (unsigned x = 0; x < grid[0] && fine; ++x) {
                cpu_builtins.block = {x, y, z};
                fine = run_block();
            }
    *counts = m.counts;
    machine = nullptr;
    return fine ? 0 : 1;
}

#define SITE ((uintptr_t)__builtin_return_address(0))
#define TSAN(n)                                                                                      \
    void __tsan_read##n(void* p) { record((uintptr_t)p, n, false, SITE); }                           \
    void __tsan_write##n(void* p) { record((uintptr_t)p, n, true, SITE); }                           \
    void __tsan_unaligned_read##n(void* p) { record((uintptr_t)p, n, false, SITE); }                 \
    void __tsan_unaligned_write##n(void* p) { record((uintptr_t)p, n, true, SITE); }
TSAN(1) TSAN(2) TSAN(4) TSAN(8) TSAN(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t n) { record((uintptr_t)p, (unsigned)n, false, SITE); }
void __tsan_write_range(void* p, size_t n) { record((uintptr_t)p, (unsigned)n, true, SITE); }
void* __tsan_memcpy(void* to, const void* from, size_t n) { return memcpy(to, from, n); }
void* __tsan_memset(void* to, int value, size_t n) { return memset(to, value, n); }
}
