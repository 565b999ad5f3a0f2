// Attention over pages: who computes what. The arithmetic is in attention_isa.h, once per instruction set.
#include <algorithm>
#include <cstring>

#include "pass.h"

namespace pingjia {
namespace {

constexpr int64_t kBlockKeys = 128;     // their keys and values of one head stay in the second cache level
constexpr int64_t kItemRows = 32;       // query rows (tokens x heads of the group) that share a block of keys

// Everything about one call that its pieces share.
struct Call {
  const Network& net;
  const Layer& layer;
  const Step& step;
  const float* qkv;
  float* o;
  int64_t group;        // query heads per key/value head
  int64_t block_pages;  // pages of a block
  int64_t block_keys() const { return block_pages * net.page_size; }
};

int64_t visible(const Piece& piece, int64_t token) { return std::max(piece.start + token + 1, piece.prefix_len); }

struct Scratch {
  std::vector<float> q, s, o, total_o;
  float maximum[kItemRows * 8], sum[kItemRows * 8], top[kItemRows * 8], total[kItemRows * 8];
  int64_t visible[kItemRows * 8];
};

thread_local Scratch scratch;

int64_t element_size(int64_t kind) { return kind == kKvFloat32 ? 4 : kind == kKvFloat16 ? 2 : 1; }

// The rows of an item: its tokens times the query heads that share the key/value head.
int64_t load_queries(const Call& call, const Plan::Item& item, int64_t head, Scratch& to) {
  const Network& net = call.net;
  const Piece& piece = call.step.pieces[item.piece];
  const int64_t rows = (item.last - item.first) * call.group, d = net.head_dim;
  if (static_cast<int64_t>(to.q.size()) < rows * d) to.q.resize(rows * d), to.o.resize(rows * d), to.total_o.resize(rows * d);
  const int64_t stride = (call.block_keys() + 15) / 16 * 16 + 16;
  if (static_cast<int64_t>(to.s.size()) < rows * stride) to.s.resize(rows * stride);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = item.first + r / call.group, query = head * call.group + r % call.group;
    const float* from = call.qkv + (piece.first_row + token) * net.qkv_width + net.q_offset + query * net.q_stride;
    for (int64_t c = 0; c < d; ++c) to.q[r * d + c] = from[c] * static_cast<float>(net.scaling);
    to.visible[r] = visible(piece, token);
  }
  return rows;
}

int64_t num_keys(const Call& call, const Plan::Item& item) {
  return visible(call.step.pieces[item.piece], item.last - 1);
}

int64_t num_blocks(const Call& call, const Plan::Item& item) {
  return (num_keys(call, item) + call.block_keys() - 1) / call.block_keys();
}

void locate_block(const Call& call, const Plan::Item& item, int64_t head, int64_t index, BlockKeys& block) {
  const Network& net = call.net;
  const Piece& piece = call.step.pieces[item.piece];
  const int64_t z = net.page_size, d = net.head_dim, size = element_size(net.kv_kind);
  const int64_t first_key = index * call.block_keys();
  block.num_keys = std::min(num_keys(call, item) - first_key, call.block_keys());
  block.stride = (call.block_keys() + 15) / 16 * 16 + 16;
  for (int64_t i = 0; i * z < block.num_keys; ++i) {
    const int64_t page = call.step.pages[piece.first_page + index * call.block_pages + i];
    const int64_t at = page * net.num_kv_heads + head;
    block.k[i] = static_cast<const char*>(call.layer.k_pages) + at * z * d * size;
    block.v[i] = static_cast<const char*>(call.layer.v_pages) + at * z * d * size;
    block.k_scale[i] = call.layer.k_scales + at * z;
    block.v_scale[i] = call.layer.v_scales + at * z;
  }
}

// Blocks first..last-1 of one item and head: calls `take(block index, rows, scratch)` after each.
template <typename Take>
void each_block(const Call& call, const Plan::Item& item, int64_t head, int64_t first, int64_t last, const Take& take) {
  Scratch& s = scratch;
  const int64_t rows = load_queries(call, item, head, s), d = call.net.head_dim, z = call.net.page_size;
  BlockKeys block;
  for (int64_t index = first; index < last; ++index) {
    locate_block(call, item, head, index, block);
    // A block in which nobody may see anything yet is skipped by the last row's count of keys; a single row that sees
    // nothing of it gets the sum 0.
    int64_t seen[kItemRows * 8];
    for (int64_t r = 0; r < rows; ++r) seen[r] = s.visible[r] - index * call.block_keys();
    pass_ops().attend(call.net.kv_kind, block, s.q.data(), seen, rows, d, z, s.s.data(), s.o.data(), s.maximum, s.sum);
    take(index, rows, s);
  }
}

float* output_row(const Call& call, const Plan::Item& item, int64_t head, int64_t r) {
  const Network& net = call.net;
  const int64_t token = call.step.pieces[item.piece].first_row + item.first + r / call.group;
  return call.o + (token * net.num_heads + head * call.group + r % call.group) * net.head_dim;
}

void write_row(const float* total_o, float total, int64_t d, float* o) {
  const float inverse = 1.0f / total;
  for (int64_t c = 0; c < d; ++c) o[c] = total_o[c] * inverse;
}

void attend_item(const Call& call, const Plan::Item& item, int64_t head) {
  const int64_t d = call.net.head_dim;
  Scratch& s = scratch;
  std::fill(s.top, s.top + kItemRows * 8, kHidden);
  std::fill(s.total, s.total + kItemRows * 8, 0.0f);
  each_block(call, item, head, 0, num_blocks(call, item), [&](int64_t index, int64_t rows, Scratch& at) {
    if (index == 0) std::fill(at.total_o.begin(), at.total_o.begin() + rows * d, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
      pass_ops().merge(at.o.data() + r * d, at.maximum[r], at.sum[r], d, at.total_o.data() + r * d, at.top + r, at.total + r);
  });
  const int64_t rows = (item.last - item.first) * call.group;
  for (int64_t r = 0; r < rows; ++r)
    write_row(s.total_o.data() + r * d, s.total[r], d, output_row(call, item, head, r));
}

// ---- few items with many keys: blocks are computed apart, then merged in the same order with the same arithmetic

struct Part {
  int32_t item, head, block;
  int64_t at;  // of its results in the buffer
};

void attend_split(const Call& call, const std::vector<Plan::Item>& items) {
  static thread_local std::vector<Part> parts;
  static thread_local std::vector<float> results;
  const int64_t d = call.net.head_dim;
  parts.clear();
  int64_t size = 0;
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t head = 0; head < call.net.num_kv_heads; ++head)
      for (int64_t block = 0; block < num_blocks(call, items[i]); ++block) {
        parts.push_back({static_cast<int32_t>(i), static_cast<int32_t>(head), static_cast<int32_t>(block), size});
        size += (items[i].last - items[i].first) * call.group * (d + 2);
      }
  results.resize(size);
  const std::vector<Part>& all = parts;  // the caller's, not the worker's own
  float* out = results.data();
  parallel_for(static_cast<int64_t>(all.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Part& part = all[i];
      each_block(call, items[part.item], part.head, part.block, part.block + 1,
                      [&](int64_t, int64_t rows, Scratch& s) {
                        float* to = out + part.at;
                        std::memcpy(to, s.o.data(), rows * d * sizeof(float));
                        std::memcpy(to + rows * d, s.maximum, rows * sizeof(float));
                        std::memcpy(to + rows * (d + 1), s.sum, rows * sizeof(float));
                      });
    }
  });
  std::vector<float> total_o(d);
  for (size_t i = 0; i < all.size();) {
    const Part& part = all[i];
    const Plan::Item& item = items[part.item];
    const int64_t rows = (item.last - item.first) * call.group, blocks = num_blocks(call, item);
    for (int64_t r = 0; r < rows; ++r) {
      float top = kHidden, total = 0.0f;
      std::fill(total_o.begin(), total_o.end(), 0.0f);
      for (int64_t b = 0; b < blocks; ++b) {
        const float* from = out + all[i + b].at;
        pass_ops().merge(from + r * d, from[rows * d + r], from[rows * (d + 1) + r], d, total_o.data(), &top, &total);
      }
      write_row(total_o.data(), total, d, output_row(call, item, part.head, r));
    }
    i += blocks;
  }
}

int64_t work(const Call& call, const std::vector<Plan::Item>& items) {
  int64_t sum = 0;
  for (const Plan::Item& item : items) sum += (item.last - item.first) * num_keys(call, item);
  return sum * call.net.num_heads * call.net.head_dim * 2;
}

void attend_items(const Call& call, const std::vector<Plan::Item>& items) {
  const int64_t heads = call.net.num_kv_heads, count = static_cast<int64_t>(items.size()) * heads;
  int64_t blocks = 0;
  for (const Plan::Item& item : items) blocks += num_blocks(call, item) * heads;
  if (num_threads() > 1 && count < 4 * num_threads() && blocks > 2 * count) return attend_split(call, items);
  share(count, work(call, items) / std::max<int64_t>(count, 1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) attend_item(call, items[i / heads], i % heads);
  });
}

}  // namespace

std::vector<Plan::Item> attention_items(const Network& net, const Step& step) {
  const int64_t group = net.num_heads / net.num_kv_heads;
  const int64_t tokens = std::max<int64_t>(kItemRows / group, 1);
  std::vector<Plan::Item> items;
  for (int32_t p = 0; p < step.num_pieces; ++p)
    for (int64_t first = 0; first < step.pieces[p].num_rows; first += tokens) {
      const int64_t last = std::min(first + tokens, step.pieces[p].num_rows);
      items.push_back({p, static_cast<int32_t>(first), static_cast<int32_t>(last)});
    }
  return items;
}

void attend(const Network& net, const Layer& layer, const Step& step, const Plan& plan, const float* qkv, float* o) {
  const int64_t pages = std::max<int64_t>(kBlockKeys / net.page_size, 1);
  const Call call{net, layer, step, qkv, o, net.num_heads / net.num_kv_heads, pages};
  attend_items(call, plan.items);
}

}  // namespace pingjia
