// One team of threads for the whole process: a call runs on all of them, which meet at barriers between phases.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kangaroo {

// What a phase knows of its place: which of how many threads it is, and the barrier between phases.
class Team {
 public:
  Team(size_t thread, size_t num_threads, std::atomic<size_t>& arrived, std::atomic<size_t>& phase)
      : thread(thread), num_threads(num_threads), arrived_(arrived), phase_(phase) {}

  const size_t thread, num_threads;

  // Wait until every thread has arrived; what they wrote before is visible afterwards.
  void meet();

  // The share of this thread in num_items items: [first, last).
  std::pair<size_t, size_t> share(size_t num_items) const {
    return {num_items * thread / num_threads, num_items * (thread + 1) / num_threads};
  }

 private:
  std::atomic<size_t>&arrived_, &phase_;
};

class Pool {
 public:
  static Pool& instance();

  // Run work on every thread of the team, the caller being thread 0; one call at a time.
  void run(const std::function<void(Team&)>& work);
  void resize(size_t num_threads);
  size_t num_threads() const { return num_threads_; }

 private:
  struct Crew;

  std::mutex mutex_;
  size_t num_threads_ = 1;
  std::shared_ptr<Crew> crew_;
};

}  // namespace kangaroo
