// Router, expert servers and attention nodes inside the test's process, over inproc or UCX, each transport
// optionally faulty; and a client that speaks the gateway's protocol to an attention node.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "libs/transport/faulty/faulty.h"
#include "libs/transport/inproc/inproc.h"
#include "services/attention/attention_service.h"
#include "services/experts/expert_service.h"
#include "services/router/router_service.h"

namespace minke::testing_support {

struct ClusterOptions {
  std::string checkpoint;
  Precision precision = Precision::kExact;
  int experts = 2;
  int attentions = 1;
  Device experts_device = Device::kCpu;
  experts::ExpertsFormat experts_format = experts::ExpertsFormat::kBF16;
  Device attention_device = Device::kCpu;
  Device router_device = Device::kCpu;
  int replicas = 1;
  bool local_routing = false;
  bool ucx = false;
  int microbatches = 1;
  attention::MlaChoice mla = attention::MlaChoice::kAuto;
  int64_t step_tokens_max = 512;
  int64_t cache_bytes = 64 << 20;
  bool reuse_prefixes = true;
  int threads = 2;
  int tensor_parallel = 1;
  std::optional<transport::FaultOptions> faults;         // around every transport
  std::optional<transport::FaultOptions> expert_faults;  // around that of the first expert server
  experts::LoadFrom load_from = experts::LoadFrom::kAuto;
  attention::ExchangeOptions exchange;
  attention::PageExchangeOptions page_exchange;
  router::Gate::Override gate_override;
  // Row memory of so many messages on each node of these roles: on the GPU where the role computes there,
  // else host memory that poses as one. 0: none.
  int attention_row_blocks = 0, router_row_blocks = 0, expert_row_blocks = 0;
  bool attention_poses = true;  // with row memory in host memory: the model has its rows "there", too
};

struct Generation {
  std::vector<uint32_t> tokens;
  std::vector<float> logprobs;         // of tokens, when wanted
  std::vector<float> prompt_logprobs;  // of prompt tokens 1...
  uint32_t cached_prompt_tokens = 0;
  inference::v1::FinishReason finish = inference::v1::FINISH_REASON_NONE;
  absl::Status error;
};

class LocalCluster {
 public:
  // Starts and waits until everything can serve; aborts after 30 s.
  explicit LocalCluster(ClusterOptions options);
  ~LocalCluster();

  // Submits all at once on one session of the first attention node and waits for every end (60 s, then the
  // rest have DEADLINE_EXCEEDED).
  std::vector<Generation> Run(const std::vector<inference::v1::Submit>& requests);
  Generation Run(const inference::v1::Submit& request) { return Run(std::vector{request}).front(); }

  attention::Engine& engine(int i = 0) { return attentions_[i]->engine(); }
  attention::AttentionService& attention(int i) { return *attentions_[i]; }
  void StopAttention(int i) { attentions_[i].reset(); }
  router::RouterEngine& router_engine() { return router_->engine(); }
  experts::ExpertService& expert(int i) { return *experts_[i]; }
  void StopExpert(int i) { experts_[i].reset(); }
  void AddExpert();  // what it is given, it loads beside the work
  const std::string& attention_address() const { return attentions_.front()->rpc_address(); }
  cluster::v1::ClusterView view() const { return router_->membership().view(); }
  const std::string& router_address() const { return router_->rpc_address(); }
  transport::FaultCounts fault_counts() const;
  // Messages with rows by where these came to lie, of nodes with row memory.
  struct RowFrames {
    uint64_t in_row_memory = 0, in_host_memory = 0;
  };
  RowFrames row_frames() const;
  // Blocks of row memory that are in use anywhere.
  int64_t blocks_in_use() const;

 private:
  transport::RowMemory* MakeRows(int blocks, Device device);
  std::unique_ptr<transport::Transport> MakeTransport(uint8_t role);

  const ClusterOptions options_;
  std::shared_ptr<const Checkpoint> checkpoint_;  // shared by the services
  // Outlive everything that has frames.
  std::vector<std::unique_ptr<transport::RowMemory>> rows_;
  transport::InprocHub hub_;
  std::vector<transport::FaultyTransport*> faulty_;
  std::unique_ptr<router::RouterService> router_;
  std::vector<std::unique_ptr<experts::ExpertService>> experts_;
  std::vector<std::unique_ptr<attention::AttentionService>> attentions_;
};

// A greedy request for `max_tokens`, with the prompt's log-probabilities if `score`.
inference::v1::Submit Greedy(const std::vector<uint32_t>& prompt, uint32_t max_tokens, bool score);

}  // namespace minke::testing_support
