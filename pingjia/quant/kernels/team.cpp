// The thread team: num_threads, parallel_for. No arithmetic here.
//
// A worker that the system has not scheduled never holds the caller up: workers join a job only while it is open, and
// the caller waits only for those that joined.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>

#include <cstdio>
#endif

namespace pingjia {
namespace {

constexpr std::chrono::microseconds kSpin{100};  // longer than the gap between two products of a decode step

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)
// Cores of the container's CPU quota, rounded up; 0: no quota.
int quota_cores() {
  long long quota = -1, period = 0;
  if (FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(file, "%lld %lld", &quota, &period) != 2) quota = -1;  // "max ..." is no number
    std::fclose(file);
  }
  return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}
#endif

std::vector<int> allowed_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &set)) cores.push_back(core);
#endif
  return cores;
}

int positive(const char* name) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : 0;
}

int default_threads() {
  if (int asked = positive("PINGJIA_THREADS"); asked > 0) return asked;
  int count = static_cast<int>(allowed_cores().size());
  if (count == 0) count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  if (int quota = quota_cores(); quota > 0 && quota < count) count = quota;
#endif
  if (int omp = positive("OMP_NUM_THREADS"); omp > 0 && omp < count) count = omp;
  return count > 0 ? count : 1;
}

using Body = std::function<void(int64_t, int64_t)>;

class Team {
 public:
  explicit Team(int count) {
    const std::vector<int> cores = allowed_cores();
    // Pin only when the team fills the machine it may use: two half-sized processes must not pin to the same cores.
    const bool pinned = count > 1 && static_cast<int>(cores.size()) == count;
    try {
      for (int i = 1; i < count; ++i) workers_.emplace_back([this, core = pinned ? cores[i] : -1] { work(core); });
    } catch (const std::system_error&) {
      // No more threads to be had: a smaller team.
    }
  }

  ~Team() {
    stop_.store(true);
    wake();
    for (std::thread& worker : workers_) worker.join();
  }

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t count, int64_t grain, const Body& body) {
    if (workers_.empty() || count <= grain || !busy_.try_lock()) return alone(count, grain, body);
    std::lock_guard<std::mutex> release(busy_, std::adopt_lock);
    body_ = &body, total_ = count, grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    const uint64_t job = (state_.load(std::memory_order_relaxed) & ~kLow) + kEpoch;
    state_.store(job | kOpen);
    if (sleepers_.load() > 0) wake();
    pieces();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & kMembers) != 0; ++spins)
      spins < 4096 ? pause() : std::this_thread::yield();
  }

 private:
  // state_: epoch | open | number of workers inside.
  static constexpr uint64_t kMembers = 0x7fff, kOpen = 0x8000, kLow = 0xffff, kEpoch = 0x10000;

  static void alone(int64_t count, int64_t grain, const Body& body) {
    for (int64_t first = 0; first < count; first += grain) body(first, first + grain < count ? first + grain : count);
  }

  void pieces() {
    for (;;) {
      const int64_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (first >= total_) return;
      (*body_)(first, first + grain_ < total_ ? first + grain_ : total_);
    }
  }

  bool join(uint64_t seen) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while ((state & kOpen) != 0 && (state & ~kLow) != seen)
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  bool posted(uint64_t seen) const {
    const uint64_t state = state_.load();  // ordered against sleepers_, as in run
    return stop_.load(std::memory_order_relaxed) || ((state & kOpen) != 0 && (state & ~kLow) != seen);
  }

  void work(int core) {
    pin(core);
    uint64_t seen = 0;
    while (wait(seen), !stop_.load()) {
      if (!join(seen)) continue;
      seen = state_.load(std::memory_order_relaxed) & ~kLow;
      pieces();
      state_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void wait(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1; !posted(seen); ++spins) {
      pause();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) return sleep(seen);
    }
  }

  void sleep(uint64_t seen) {
    std::unique_lock<std::mutex> lock(door_);
    sleepers_.fetch_add(1);
    bell_.wait(lock, [&] { return posted(seen); });
    sleepers_.fetch_sub(1);
  }

  void wake() {
    { std::lock_guard<std::mutex> lock(door_); }
    bell_.notify_all();
  }

  static void pin(int core) {
#if defined(__linux__)
    if (core < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
    (void)core;
#endif
  }

  std::vector<std::thread> workers_;
  std::mutex busy_, door_;
  std::condition_variable bell_;
  std::atomic<bool> stop_{false};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<uint64_t> state_{kEpoch};
  alignas(64) std::atomic<int64_t> next_{0};
  const Body* body_ = nullptr;
  int64_t total_ = 0, grain_ = 1;
};

std::atomic<Team*> current{nullptr};
std::mutex making;

// In the child of a fork the workers are gone and locks may be held for ever: leave the old team where it is.
void forget_team() {
  current.store(nullptr);
  new (&making) std::mutex;
}

Team* team() {
  if (Team* found = current.load(std::memory_order_acquire)) return found;
  std::lock_guard<std::mutex> lock(making);
  if (Team* found = current.load()) return found;
#if !defined(_WIN32)
  static bool registered = pthread_atfork(nullptr, nullptr, forget_team) == 0;
  (void)registered;
#endif
  Team* made = new Team(default_threads());
  current.store(made, std::memory_order_release);
  return made;
}

}  // namespace

int num_threads() { return team()->count(); }

// The old team is joined and freed: no product may be running in another thread.
void set_num_threads(int count) {
  Team* old = team();
  if (count < 1 || count == old->count()) return;
  current.store(new Team(count), std::memory_order_release);
  delete old;
}

void parallel_for(int64_t count, int64_t grain, const Body& body) { team()->run(count, grain < 1 ? 1 : grain, body); }

}  // namespace pingjia
