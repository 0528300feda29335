#include "pool.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <chrono>

namespace kangaroo {

namespace {

// How long a thread spins before it sleeps. A barrier's partner is nearly always about to arrive, and the next call
// mostly follows after a little Python; spinning longer would take the core from those who wait for it: a partner, or
// PyTorch's own threads.
constexpr int kSpinsPerBarrier = 4000;
constexpr std::chrono::microseconds kSpinBetweenCalls(300);

// What a waiting thread fetches at most, in cache lines: what the nearest caches have room for.
constexpr size_t kMostLines = 8192;

// The default floating-point mode, for as long as this lives: rounding to nearest, and denormal numbers kept, whatever
// the thread had before. The mode is each thread's own, and a value must not depend on the thread that computes it.
class DefaultMode {
 public:
#if defined(__x86_64__)
  DefaultMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  DefaultMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~DefaultMode() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait(size_t num_threads, std::initializer_list<Stretch> coming) {
  if (num_threads == 1) return;
  const size_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
    arrived_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      phase_.store(phase + 1, std::memory_order_release);
    }
    return passed_.notify_all();
  }
  size_t num_lines = 0;
  for (const auto& [first, last] : coming) {
    for (const char* line = first; line < last && num_lines < kMostLines; line += 64, ++num_lines) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      __builtin_prefetch(line, 0, 2);
    }
  }
  for (int spins = 0; spins < kSpinsPerBarrier; ++spins) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  passed_.wait(lock, [&] { return phase_.load(std::memory_order_acquire) != phase; });
}

// Threads of one size of the team. They hold it alive themselves, so that a forked child, which has none of them,
// can simply leave it behind.
struct Pool::Crew : std::enable_shared_from_this<Pool::Crew> {
  explicit Crew(size_t num_threads) : num_threads(num_threads), process(getpid()) {}

  const size_t num_threads;
  const pid_t process;
  std::vector<std::thread> threads;
  std::atomic<size_t> call{0};
  Barrier barrier;
  std::mutex mutex;
  std::condition_variable called;
  const std::function<void(Team&)>* work = nullptr;
  bool closing = false;

  void start() {
    try {
      for (size_t thread = 1; thread < num_threads; ++thread) {
        threads.emplace_back([self = shared_from_this(), thread] { self->serve(thread); });
      }
    } catch (...) {
      close();  // the system refused a thread: none is left waiting for it
      throw;
    }
  }

  void serve(size_t thread) {
    const DefaultMode mode;
    Team team(thread, num_threads, barrier);
    for (size_t seen = 0;;) {
      wait_for_call(seen);
      seen = call.load(std::memory_order_acquire);
      if (closing) return;
      (*work)(team);
      team.meet();
    }
  }

  void wait_for_call(size_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpinBetweenCalls;
    while (std::chrono::steady_clock::now() < until) {
      for (int spins = 0; spins < 64; ++spins) {
        if (call.load(std::memory_order_acquire) != seen) return;
        pause();
      }
    }
    std::unique_lock<std::mutex> lock(mutex);
    called.wait(lock, [&] { return call.load(std::memory_order_acquire) != seen; });
  }

  void announce() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      call.fetch_add(1, std::memory_order_acq_rel);
    }
    called.notify_all();
  }

  void close() {
    closing = true;
    announce();
    for (auto& thread : threads) thread.join();
  }
};

Pool& Pool::instance() {
  // Never destroyed: its threads may outlive the interpreter's last call.
  static Pool* pool = new Pool;
  return *pool;
}

void Pool::resize(size_t num_threads) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (crew_ && crew_->process == getpid()) {
    crew_->close();
  } else if (crew_) {
    new std::shared_ptr<Crew>(crew_);  // a parent's crew: its threads do not exist here and cannot be joined
  }
  crew_ = nullptr;
  num_threads_ = num_threads;
}

void Pool::run(const std::function<void(Team&)>& work) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (crew_ && crew_->process != getpid()) {
    new std::shared_ptr<Crew>(crew_);
    crew_ = nullptr;
  }
  if (!crew_) {
    auto crew = std::make_shared<Crew>(num_threads_);
    crew->start();
    crew_ = std::move(crew);
  }
  const DefaultMode mode;
  Team team(0, crew_->num_threads, crew_->barrier);
  crew_->work = &work;
  if (crew_->num_threads > 1) crew_->announce();
  work(team);
  team.meet();
}

}  // namespace kangaroo
