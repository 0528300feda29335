// One team of threads for the whole process: a call runs on all of them, which meet at barriers between phases.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace kangaroo {

// Memory that is about to be read: [first, last).
using Stretch = std::pair<const char*, const char*>;

class Barrier {
 public:
  // Return once num_threads threads have called; fetches what is to come, spins for a moment, then sleeps.
  void wait(size_t num_threads, std::initializer_list<Stretch> coming);

 private:
  std::atomic<size_t> arrived_{0}, phase_{0};
  std::mutex mutex_;
  std::condition_variable passed_;
};

// The part-th of num_parts shares of num_items items, as even as they come: [first, last).
inline std::pair<size_t, size_t> share_out(size_t num_items, size_t part, size_t num_parts) {
  return {num_items * part / num_parts, num_items * (part + 1) / num_parts};
}

// What a phase knows of its place: which of how many threads it is, and the barrier between phases.
class Team {
 public:
  Team(size_t thread, size_t num_threads, Barrier& barrier)
      : thread(thread), num_threads(num_threads), barrier_(barrier) {}

  const size_t thread, num_threads;

  // Wait until every thread has arrived, and meanwhile fetch what is to come; what they wrote before is visible
  // afterwards.
  void meet(std::initializer_list<Stretch> coming = {}) { barrier_.wait(num_threads, coming); }

  // The share of this thread in num_items items: [first, last).
  std::pair<size_t, size_t> share(size_t num_items) const { return share_out(num_items, thread, num_threads); }

 private:
  Barrier& barrier_;
};

// A child forked between calls starts threads of its own; forking while another thread is inside a call is not
// supported.
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
