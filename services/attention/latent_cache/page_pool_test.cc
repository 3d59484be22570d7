#include "services/attention/latent_cache/page_pool.h"

#include <map>
#include <random>
#include <set>

#include "gtest/gtest.h"

namespace minke::attention {
namespace {

std::vector<uint32_t> Tokens(int64_t n, uint32_t first) {
  std::vector<uint32_t> tokens(n);
  for (int64_t i = 0; i < n; ++i) tokens[i] = first + static_cast<uint32_t>(i);
  return tokens;
}

// Takes pages for all of `tokens` and publishes them.
std::vector<uint32_t> Fill(PagePool& pool, const std::vector<uint32_t>& tokens) {
  std::vector<uint32_t> pages;
  Prefix prefix;
  for (size_t begin = 0; begin < tokens.size(); begin += 64) {
    pages.push_back(*pool.Take());
    prefix = pool.Publish(pages.back(), prefix, std::span(tokens).subspan(begin, 64));
  }
  return pages;
}

void ReleaseAll(PagePool& pool, const std::vector<uint32_t>& pages) {
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) pool.Release(*page);
}

TEST(PagePool, UntouchedMemoryStaysUntouched) {
  PagePool pool(10);
  const uint32_t first = *pool.Take();
  pool.Release(first);
  EXPECT_EQ(*pool.Take(), first);
}

TEST(PagePool, MatchesTheLongestPublishedPrefix) {
  PagePool pool(10);
  const auto tokens = Tokens(192, 5);
  const auto pages = Fill(pool, tokens);
  ReleaseAll(pool, pages);
  EXPECT_EQ(pool.used(), 0);
  EXPECT_EQ(pool.cached(), 3);

  Prefix prefix;
  EXPECT_EQ(pool.Match(std::span(tokens).first(191), prefix), (std::vector<uint32_t>{pages[0], pages[1]}));
  EXPECT_EQ(pool.used(), 2);
  auto other = tokens;
  other[64] = 999;  // page 1 differs: page 2 must not be found although its own tokens are the same
  EXPECT_EQ(pool.Match(other, prefix), std::vector<uint32_t>{pages[0]});
  other = tokens;
  other[0] = 999;
  EXPECT_TRUE(pool.Match(other, prefix).empty());
  EXPECT_EQ(prefix.publication, 0u);
  ReleaseAll(pool, {pages[0], pages[1]});
  pool.Release(pages[0]);
  EXPECT_EQ(pool.used(), 0);
}

TEST(PagePool, TwoSequencesMayFillTheSameContent) {
  PagePool pool(4);
  const auto tokens = Tokens(64, 1), more = Tokens(64, 500);
  const uint32_t a = *pool.Take(), b = *pool.Take(), c = *pool.Take();
  const Prefix first = pool.Publish(a, {}, tokens), second = pool.Publish(b, {}, tokens);
  EXPECT_EQ(first.publication, second.publication);
  pool.Publish(c, second, more);  // continues the page that stayed
  ReleaseAll(pool, {a, b, c});
  EXPECT_EQ(pool.cached(), 2);  // the double is free at once
  auto all = tokens;
  all.insert(all.end(), more.begin(), more.end());
  Prefix prefix;
  EXPECT_EQ(pool.Match(all, prefix), (std::vector<uint32_t>{a, c}));
}

TEST(PagePool, ThePrefixUnusedForLongestGoesFirstFromItsEnd) {
  PagePool pool(4);
  const auto old = Tokens(128, 1), young = Tokens(128, 1000);
  const auto old_pages = Fill(pool, old);
  const auto young_pages = Fill(pool, young);
  ReleaseAll(pool, old_pages);
  ReleaseAll(pool, young_pages);
  (void)pool.TakeChanges();
  EXPECT_EQ(*pool.Take(), old_pages[1]);
  const auto changes = pool.TakeChanges();
  ASSERT_EQ(changes.size(), 1u);
  EXPECT_FALSE(changes[0].gained);
  EXPECT_EQ(changes[0].name, cluster::PrefixHashes(old)[1]);
  EXPECT_EQ(*pool.Take(), old_pages[0]);
  EXPECT_EQ(*pool.Take(), young_pages[1]);
  EXPECT_EQ(*pool.Take(), young_pages[0]);
  EXPECT_EQ(pool.Take(), std::nullopt);
}

TEST(PagePool, ALeftoverWhoseBeginningIsGoneIsReplaced) {
  PagePool pool(3);
  const auto tokens = Tokens(128, 7);
  const auto pages = Fill(pool, tokens);
  pool.Release(pages[0]);  // the beginning first: it is evicted first
  pool.Release(pages[1]);
  ASSERT_EQ(pool.Take(), std::optional<uint32_t>(2));
  ASSERT_EQ(*pool.Take(), pages[0]);
  Prefix prefix = pool.Publish(pages[0], {}, std::span(tokens).first(64));  // the same tokens again
  pool.Publish(2, prefix, std::span(tokens).subspan(64));
  EXPECT_EQ(pool.available(), 1);  // the leftover
  Prefix found;
  EXPECT_EQ(pool.Match(tokens, found), (std::vector<uint32_t>{pages[0], 2}));
}

// Against a plain model: which page holds which tokens, who refers to it, and what a gateway would believe.
TEST(PagePool, RandomUseAgainstAModel) {
  for (int seed = 0; seed < 40; ++seed) {
    std::mt19937 rng(seed);
    const int64_t total = 3 + rng() % 20;
    PagePool pool(total);
    struct Holder {
      std::vector<uint32_t> tokens, pages;
    };
    std::vector<Holder> holders;
    std::map<uint32_t, std::vector<uint32_t>> content;  // page: the whole prefix it was filled with
    std::set<uint64_t> names;
    for (int step = 0; step < 600; ++step) {
      if (!holders.empty() && rng() % 2 == 0) {
        const size_t i = rng() % holders.size();
        ReleaseAll(pool, holders[i].pages);
        holders.erase(holders.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        Holder holder;
        for (int page = 1 + rng() % 4; page > 0; --page) {
          const auto more = Tokens(64, rng() % 2);  // few different pages: much is shared
          holder.tokens.insert(holder.tokens.end(), more.begin(), more.end());
        }
        Prefix prefix;
        holder.pages = pool.Match(holder.tokens, prefix);
        for (size_t i = 0; i < holder.pages.size(); ++i) {
          ASSERT_EQ(content[holder.pages[i]],
                    std::vector<uint32_t>(holder.tokens.begin(), holder.tokens.begin() + (i + 1) * 64));
        }
        for (size_t i = holder.pages.size(); i * 64 < holder.tokens.size(); ++i) {
          const auto page = pool.Take();
          if (!page) break;
          for (const Holder& other : holders) {
            ASSERT_EQ(std::count(other.pages.begin(), other.pages.end(), *page), 0)
                << "taken from its holder";
          }
          holder.pages.push_back(*page);
          content[*page].assign(holder.tokens.begin(), holder.tokens.begin() + (i + 1) * 64);
          prefix = pool.Publish(*page, prefix, std::span(holder.tokens).subspan(i * 64, 64));
        }
        holders.push_back(std::move(holder));
      }
      std::set<uint32_t> referred;
      for (const Holder& holder : holders) referred.insert(holder.pages.begin(), holder.pages.end());
      ASSERT_EQ(pool.used(), std::ssize(referred));
      ASSERT_LE(pool.cached(), pool.available());
      for (const PrefixChange& change : pool.TakeChanges()) {
        if (change.gained) {
          ASSERT_TRUE(names.insert(change.name).second);
        } else {
          ASSERT_EQ(names.erase(change.name), 1u);
        }
      }
    }
    for (const Holder& holder : holders) ReleaseAll(pool, holder.pages);
    EXPECT_EQ(pool.used(), 0);
    for (int64_t i = 0; i < total; ++i) ASSERT_TRUE(pool.Take());
    for (const PrefixChange& change : pool.TakeChanges()) names.erase(change.name);
    EXPECT_TRUE(names.empty());
  }
}

}  // namespace
}  // namespace minke::attention
