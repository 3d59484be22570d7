// Between the gateway's own types and the messages of proto/inference. Pure functions.
#pragma once

#include "proto/inference/inference.pb.h"
#include "services/gateway/generation/types.h"

namespace minke::gateway {

void ToProto(const Sampling& sampling, inference::v1::SamplingParams* proto);
SequenceEvent FromProto(inference::v1::Event* event);  // takes its contents
void ToProto(const TokenLogprob& logprob, inference::v1::TokenLogprobs* proto);
inference::v1::FinishReason ToProto(FinishReason reason);

}  // namespace minke::gateway
