// Tensors for results. Large ones keep their memory for the next.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

namespace graphprune {

// Large results that were freed. malloc would ask the system for as much at each call, and the system clear every page.
class Kept {
 public:
  static constexpr int64_t large = int64_t{32} << 20;  // bytes: from here on malloc never keeps anything

  static Kept& instance() {
    static Kept* kept = new Kept;  // never destroyed: results may outlive what is static
    return *kept;
  }

  // At least so many bytes, and at most twice as many.
  std::pair<int64_t, void*> take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->first >= bytes && it->first <= 2 * bytes) {
          const auto found = *it;
          free_.erase(it);
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
    if (free_.size() <= 2) return;
    std::free(free_.front().second);
    free_.erase(free_.begin());
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<int64_t, void*>> free_;  // the two that came back last
};

inline at::Tensor make_result(at::IntArrayRef shape, at::ScalarType type) {
  const int64_t bytes = c10::multiply_integers(shape) * static_cast<int64_t>(c10::elementSize(type));
  if (bytes < Kept::large) return at::empty(shape, type);
  const auto room = Kept::instance().take(bytes);
  return at::from_blob(room.second, shape, [room](void*) { Kept::instance().give_back(room); }, at::TensorOptions().dtype(type));
}

}  // namespace graphprune
