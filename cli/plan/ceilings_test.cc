#include "cli/plan/ceilings.h"

#include <tuple>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace minke::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string ErrorOf(const std::string& json) {
  const auto parsed = ParseCeilings(json, {});
  return parsed.ok() ? "no error" : std::string(parsed.status().message());
}

TEST(Ceilings, BuiltInOnesAreComplete) {
  for (const std::string& name : GpuNames()) {
    const auto c = BuiltInCeilings(name);
    ASSERT_TRUE(c.ok()) << name;
    EXPECT_EQ(c->name, name);
    EXPECT_FALSE(c->source.empty());
    EXPECT_TRUE(CheckComplete(*c).ok());
    for (const double rate : {c->decode_flops, c->prefill_flops, c->expert_flops, c->expert_fp8_flops,
                              c->expert_bytes_per_s, c->expert_fp8_bytes_per_s})
      EXPECT_GT(rate, 0) << name;
  }
  EXPECT_THAT(std::string(BuiltInCeilings("h900").status().message()),
              AllOf(HasSubstr("h200"), HasSubstr("found h900")));
}

TEST(Ceilings, RoofIsTheSumTheMaximumOrBetween) {
  Ceilings c;
  c.overlap = 1;
  EXPECT_DOUBLE_EQ(c.Roof(3, 1, 4, 1), 7);
  c.overlap = 2;
  EXPECT_DOUBLE_EQ(c.Roof(3, 1, 4, 1), 5);
  c.overlap = 64;
  EXPECT_DOUBLE_EQ(c.Roof(3, 1, 4, 1), 4);
  EXPECT_DOUBLE_EQ(c.Roof(0, 1, 0, 1), 0);
}

TEST(Ceilings, ByHandLieOverTheBase) {
  const auto c = ParseCeilings(R"({"name": "mine", "read_gb_s": 1000, "memory_gb": 40, "overlap": 1})",
                               BuiltInCeilings("h200").value());
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->name, "mine");
  EXPECT_DOUBLE_EQ(c->read_bytes_per_s, 1e12);
  EXPECT_DOUBLE_EQ(c->memory_bytes, 40e9);
  EXPECT_DOUBLE_EQ(c->product_flops, 790e12) << "of the base";
}

TEST(Ceilings, RatesNobodyMeasuredAreThoseOfProducts) {
  const auto c = ParseCeilings(R"({"bf16_tflops": 2, "read_gb_s": 30})", {});
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_DOUBLE_EQ(c->expert_flops, 2e12);
  EXPECT_DOUBLE_EQ(c->decode_flops, 2e12);
  EXPECT_DOUBLE_EQ(c->expert_bytes_per_s, 30e9);
  EXPECT_DOUBLE_EQ(c->expert_fp8_flops, 0) << "nothing is known of fp8";
  EXPECT_THAT(std::string(CheckComplete(*c).message()), HasSubstr("memory_gb"));
}

// What `minke bench kernels --json` wrote on 16 cores of an Intel Xeon, two threads, shortened.
TEST(Ceilings, OfMinkeBenchKernels) {
  const auto c = ParseCeilings(
      R"({"context": {"threads": 2, "ceilings": {"read_bytes_per_second": 26.5e9,
          "f32_flops_per_second": 2.6e11,
          "bf16_flops_per_second": 3.6e12, "bf16_dot": true}},
          "benchmarks": [
            {"name": "GroupedFfn/160x1024x384/4", "bytes": 377e6, "flops": 1.5e9,
             "bytes_per_second": 16.7e9, "GFLOP/s": 66.6},
            {"name": "GroupedFfn/160x1024x384/1", "bytes": 377e6, "flops": 0.4e9,
             "bytes_per_second": 19.9e9, "GFLOP/s": 19.9},
            {"name": "GroupedFfn/20x5120x1536/64", "bytes": 943.7e6, "flops": 60.4e9,
             "bytes_per_second": 7.3e9, "GFLOP/s": 467},
            {"name": "MlaDecode/heads:16/batch:32/depth:8192", "bytes": 1, "flops": 1,
             "bytes_per_second": 1, "GFLOP/s": 220},
            {"name": "RmsNormToBf16/1/5120", "bytes": 1, "flops": 0,
             "bytes_per_second": 1, "GFLOP/s": 0}]})",
      {});
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_DOUBLE_EQ(c->read_bytes_per_s, 26.5e9);
  EXPECT_DOUBLE_EQ(c->product_flops, 3.6e12);
  EXPECT_DOUBLE_EQ(c->expert_bytes_per_s, 19.9e9) << "the best of the rows that read";
  // 60.4 GFLOP took 129.3 ms, of which reading 943.7 MB is 47.4.
  EXPECT_NEAR(c->expert_flops / 1e9, 60.4 / (60.4 / 467 - 0.9437 / 19.9), 0.5);
  EXPECT_DOUBLE_EQ(c->decode_flops, 220e9);
  EXPECT_DOUBLE_EQ(c->overlap, 1);
}

TEST(Ceilings, OfBenchGpuRun) {
  const auto c = ParseCeilings(
      R"({"device": "NVIDIA H200", "copy_gbps": 4246, "product_tflops": 795, "rows": [
          {"work": "FFN bf16, V2, 20 experts, 64 rows each", "ms": 0.236, "tflops": 256, "gbps": 3992},
          {"work": "FFN bf16, V2, 20 experts, 512 rows each", "ms": 0.777, "tflops": 622, "gbps": 1215},
          {"work": "FFN fp8, V2, 20 experts, 512 rows each", "ms": 1.15, "tflops": 420, "gbps": 411},
          {"work": "MLA decode, 16 heads, B=256, context 4096", "ms": 1, "tflops": 119, "gbps": 3963},
          {"work": "MLA decode, 128 heads, B=128, context 4096", "ms": 0.27, "tflops": 541, "gbps": 2240}]})",
      BuiltInCeilings("h200").value());
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_DOUBLE_EQ(c->read_bytes_per_s, 4246e9);
  EXPECT_DOUBLE_EQ(c->product_flops, 795e12);
  EXPECT_DOUBLE_EQ(c->expert_flops, 622e12);
  EXPECT_DOUBLE_EQ(c->expert_bytes_per_s, 3992e9);
  EXPECT_DOUBLE_EQ(c->expert_fp8_flops, 420e12);
  EXPECT_DOUBLE_EQ(c->decode_flops, 541e12) << "of 128 heads: with 16 the memory is the limit";
  EXPECT_DOUBLE_EQ(c->prefill_flops, 600e12) << "of the base";
}

TEST(Ceilings, OfBenchCpuTable) {
  const auto c = ParseCeilings(
      R"({"cores": 2, "serve": {"decode 1": 51, "GB/s decode 1": 33, "GFLOP/s decode 1": 430,
          "GB/s decode 8": 35,
          "GFLOP/s decode 8": 434, "GB/s depth 16": 31, "GFLOP/s depth 16": 436, "PSS GiB, peak": 5}})",
      {});
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_DOUBLE_EQ(c->read_bytes_per_s, 33e9);
  EXPECT_DOUBLE_EQ(c->product_flops, 434e9);
}

TEST(Ceilings, WhatIsWrongIsNamed) {
  EXPECT_THAT(ErrorOf("{\"name\": " + std::string(200'000, '[') + std::string(200'000, ']') + "}"),
              HasSubstr("levels of nesting"));
  EXPECT_THAT(ErrorOf("["), HasSubstr("expected a JSON object"));
  EXPECT_THAT(ErrorOf("[1]"), HasSubstr("expected a JSON object"));
  EXPECT_THAT(ErrorOf(R"({"bf16_tflop": 3})"), HasSubstr("unknown field \"bf16_tflop\""));
  EXPECT_THAT(ErrorOf(R"({"read_gb_s": "fast"})"),
              AllOf(HasSubstr("read_gb_s"), HasSubstr("found \"fast\"")));
  EXPECT_THAT(ErrorOf(R"({"read_gb_s": 0})"), HasSubstr("above 0"));
  EXPECT_THAT(ErrorOf(R"({"read_gb_s": 1e-300})"), HasSubstr("of a size that there is, found 1e-300"));
  EXPECT_THAT(ErrorOf(R"({"read_gb_s": 1e300})"), HasSubstr("found 1e+300"));
  EXPECT_THAT(ErrorOf(R"({"read_gb_s": -1})"), HasSubstr("found -1"));
  EXPECT_THAT(ErrorOf(R"({"overlap": 0.5})"), HasSubstr("at least 1"));
  EXPECT_THAT(ErrorOf(R"({"name": 3})"), HasSubstr("\"name\" to be a string"));
  EXPECT_THAT(ErrorOf(R"({"copy_gbps": null})"), HasSubstr("copy_gbps"));
  EXPECT_THAT(ErrorOf(R"({"copy_gbps": 1, "rows": 3})"), HasSubstr("\"rows\" to be a list"));
  EXPECT_THAT(ErrorOf(R"({"copy_gbps": 1, "rows": [3]})"), HasSubstr("\"work\""));
  EXPECT_THAT(ErrorOf(R"({"context": {"ceilings": 4}})"), HasSubstr("\"ceilings\" to be an object"));
  EXPECT_THAT(ErrorOf(R"({"serve": {}})"), HasSubstr("bench/cpu_table"));
  EXPECT_THAT(ErrorOf(R"({"serve": 7})"), HasSubstr("\"serve\" to be an object"));
  EXPECT_THAT(std::string(LoadCeilings("/nowhere.json", {}).status().message()),
              HasSubstr("/nowhere.json: expected a readable file"));
}

}  // namespace
}  // namespace minke::cli
