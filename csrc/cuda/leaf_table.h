// The host's side of operations on many leaves: the leaves with all that they point to as one block of bytes, for one
// copy to the device.
#pragma once
#include <algorithm>
#include <vector>

#include "operations.h"

namespace fastagg::cuda {

/// Plans and fills the block: a flag a leaf, the leaves, then sources and weights. Leaves without elements are left
/// out.
class LeafTableBuilder {
 public:
  /// `leaves` must outlive the builder. Weights that neighbouring leaves share are stored once.
  LeafTableBuilder(const Leaf* leaves, int64_t count) : leaves_(leaves) {
    for (int64_t i = 0; i < count; ++i)
      if (leaves[i].count > 0) indices_.push_back(i);
    leaves_at_ = (indices_.size() * sizeof(int32_t) + 7) / 8 * 8;
    end_ = leaves_at_ + indices_.size() * sizeof(TableLeaf);
    for (size_t i = 0; i < indices_.size(); ++i) {
      const size_t clients = leaf(i).clients;
      sources_at_.push_back(end_);
      end_ += clients * sizeof(Source);
      weights_at_.push_back(shares_weights(i) ? weights_at_.back() : end_);
      if (!shares_weights(i)) end_ += clients * sizeof(double);
    }
  }

  int64_t size() const { return static_cast<int64_t>(indices_.size()); }
  /// The leaf's index among those given.
  int64_t index_of(int64_t i) const { return indices_[i]; }
  size_t bytes() const { return end_; }
  /// Tasks of all leaves.
  int64_t tasks() const {
    int64_t tasks = 0;
    for (const int64_t i : indices_) tasks += tasks_of(leaves_[i]);
    return tasks;
  }
  /// Any array of the leaves: their device is the table's.
  const void* any_data() const { return leaf(0).clients > 0 ? leaf(0).sources[0].data : leaf(0).out; }

  /// The bytes of a table that will lie at `device`, and its descriptor. The flags, zero, come first.
  std::vector<char> bytes_for(char* device, LeafTable* table) const {
    std::vector<char> bytes(end_);
    int64_t tasks = 0;
    for (size_t i = 0; i < indices_.size(); ++i) {
      TableLeaf entry{leaf(i), tasks, is_aligned(leaf(i))};
      tasks += tasks_of(leaf(i));
      entry.leaf.sources = reinterpret_cast<const Source*>(device + sources_at_[i]);
      entry.leaf.weights = reinterpret_cast<const double*>(device + weights_at_[i]);
      memcpy(bytes.data() + leaves_at_ + i * sizeof entry, &entry, sizeof entry);
      std::copy_n(leaf(i).sources, leaf(i).clients, reinterpret_cast<Source*>(bytes.data() + sources_at_[i]));
      std::copy_n(leaf(i).weights, leaf(i).clients, reinterpret_cast<double*>(bytes.data() + weights_at_[i]));
    }
    *table = {reinterpret_cast<const TableLeaf*>(device + leaves_at_), size(), tasks,
              reinterpret_cast<int32_t*>(device)};
    return bytes;
  }

 private:
  const Leaf& leaf(size_t i) const { return leaves_[indices_[i]]; }
  static int64_t tasks_of(const Leaf& leaf) { return (leaf.count + kTask - 1) / kTask; }

  bool shares_weights(size_t i) const {
    return i > 0 && leaf(i).weights == leaf(i - 1).weights && leaf(i).clients == leaf(i - 1).clients;
  }

  static bool is_aligned(const Leaf& leaf) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(leaf.out);
    if (is_state(leaf.code)) bits |= reinterpret_cast<uintptr_t>(leaf.companion);
    for (int32_t k = 0; k < leaf.clients; ++k) {
      const Source& source = leaf.sources[k];
      bits |= reinterpret_cast<uintptr_t>(source.data);
      if (is_state(source.code)) bits |= reinterpret_cast<uintptr_t>(source.companion);
    }
    return bits % kAlignment == 0;
  }

  const Leaf* leaves_;
  std::vector<int64_t> indices_;
  std::vector<size_t> sources_at_, weights_at_;
  size_t leaves_at_ = 0, end_ = 0;
};

/// The leaves of a `server_step`, those without elements left out, and how many tasks they make.
inline std::vector<StepLeaf> step_leaves_of(const ModelLeaf* leaves, int64_t count, int64_t* tasks) {
  std::vector<StepLeaf> entries;
  *tasks = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (leaves[i].count == 0) continue;
    uintptr_t bits = 0;
    for (const void* data :
         {leaves[i].model, leaves[i].mean, static_cast<const void*>(leaves[i].first_moment),
          static_cast<const void*>(leaves[i].second_moment), static_cast<const void*>(leaves[i].out)})
      bits |= reinterpret_cast<uintptr_t>(data);
    entries.push_back({leaves[i], *tasks, bits % kAlignment == 0});
    *tasks += (leaves[i].count + kTask - 1) / kTask;
  }
  return entries;
}

}  // namespace fastagg::cuda
