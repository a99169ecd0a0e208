// Tensors for results. Large ones keep their memory for the next.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

namespace graphprune {

// Large results that were freed. malloc would give their memory back to the system, which clears every page when it is asked again.
class Kept {
 public:
  static constexpr int64_t large = int64_t{256} << 10;  // bytes of a result
  static constexpr int64_t most = int64_t{256} << 20;   // bytes of all that is kept

  static Kept& instance() {
    static Kept* kept = new Kept;  // never destroyed: results may outlive what is static
    return *kept;
  }

  // At least so many bytes, and at most twice as many: of those that came back last, whose lines a cache may still have.
  std::pair<int64_t, void*> take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      const auto fits = [bytes](const auto& room) { return room.first >= bytes && room.first <= 2 * bytes; };
      const auto last = std::find_if(free_.rbegin(), free_.rend(), fits);
      if (last != free_.rend()) {
        const auto found = *last;
        free_.erase(std::next(last).base());
        bytes_ -= found.first;
        return found;
      }
    }
    const int64_t whole = (bytes + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, whole);
    TORCH_CHECK(memory != nullptr, "there is no memory for a result of ", bytes, " bytes");
    return {whole, memory};
  }

  void give_back(std::pair<int64_t, void*> room) {
    const std::lock_guard lock(mutex_);
    free_.push_back(room);
    bytes_ += room.first;
    for (; bytes_ > most; free_.erase(free_.begin())) {
      bytes_ -= free_.front().first;
      std::free(free_.front().second);
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<int64_t, void*>> free_;  // in the order in which they came back
  int64_t bytes_ = 0;                            // of them
};

inline at::Tensor make_result(at::IntArrayRef shape, at::ScalarType type) {
  const int64_t bytes = c10::multiply_integers(shape) * static_cast<int64_t>(c10::elementSize(type));
  if (bytes < Kept::large) return at::empty(shape, type);
  const auto room = Kept::instance().take(bytes);
  return at::from_blob(room.second, shape, [room](void*) { Kept::instance().give_back(room); }, at::TensorOptions().dtype(type));
}

}  // namespace graphprune
